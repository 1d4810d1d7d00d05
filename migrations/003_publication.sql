-- What the stream contains of the table. Created by the table's owner, so that prefetchd needs no right to the
-- database.
-- It must be older than the replication slot: a slot cannot decode what was written before its publication existed.

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_publication WHERE pubname = 'prefetchd') THEN
        -- publish_via_partition_root: changes of a partition arrive under the name of the partitioned table, which is
        -- the one in the configuration. It makes no difference without partitions.
        CREATE PUBLICATION prefetchd FOR TABLE categories WITH (publish_via_partition_root = true);
    END IF;
END
$$;
