// Debezium's engine in a process of its own, with the least that can come after it: each record becomes an HSET or a DEL, a
// batch of them goes to Redis in one pipeline. The records stay Java objects, so nothing is spent on JSON.
//
// Arguments: host, port, password of Postgres; port and password of Redis; a file for offsets.

import io.debezium.embedded.Connect;
import io.debezium.engine.ChangeEvent;
import io.debezium.engine.DebeziumEngine;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Properties;
import org.apache.kafka.connect.data.Field;
import org.apache.kafka.connect.data.Struct;
import org.apache.kafka.connect.source.SourceRecord;
import redis.clients.jedis.Jedis;
import redis.clients.jedis.Pipeline;

public class DebeziumToRedis {
    public static void main(String[] args) throws Exception {
        Jedis redis = new Jedis("127.0.0.1", Integer.parseInt(args[3]));
        redis.auth(args[4]);
        DebeziumEngine<ChangeEvent<SourceRecord, SourceRecord>> engine = DebeziumEngine.create(Connect.class)
            .using(settings(args))
            .notifying((records, committer) -> {
                write(redis, records);
                for (var record : records) {
                    committer.markProcessed(record);
                }
                committer.markBatchFinished();
            })
            .using((success, message, error) -> {
                if (!success) {
                    System.err.println(message);
                    Runtime.getRuntime().halt(1);
                }
            })
            .build();
        Thread running = new Thread(engine);
        Runtime.getRuntime().addShutdownHook(new Thread(() -> {
            try {
                engine.close();
                running.join();
            } catch (Exception error) {
                error.printStackTrace();
            }
        }));
        running.start();
    }

    static void write(Jedis redis, List<ChangeEvent<SourceRecord, SourceRecord>> records) {
        Pipeline pipeline = redis.pipelined();
        for (var event : records) {
            SourceRecord record = event.value();
            if (!(record.key() instanceof Struct key)) {
                continue;
            }
            String name = "bench:item:" + key.getInt64("id");
            Struct row = ((Struct) record.value()).getStruct("after");
            if (row == null) {
                pipeline.del(name);
                continue;
            }
            Map<String, String> fields = new HashMap<>();
            for (Field field : row.schema().fields()) {
                Object value = row.get(field);
                fields.put(field.name(), value == null ? "" : value.toString());
            }
            pipeline.hset(name, fields);
        }
        pipeline.sync();
    }

    static Properties settings(String[] args) {
        Properties settings = new Properties();
        String[] all = {
            "name", "bench", "topic.prefix", "bench",
            "connector.class", "io.debezium.connector.postgresql.PostgresConnector",
            "database.hostname", args[0], "database.port", args[1], "database.user", "postgres",
            "database.password", args[2], "database.dbname", "postgres",
            "table.include.list", "public.items", "plugin.name", "pgoutput", "slot.name", "debezium",
            "publication.name", "prefetchd", "publication.autocreate.mode", "disabled",
            "offset.storage", "org.apache.kafka.connect.storage.FileOffsetBackingStore",
            "offset.storage.file.filename", args[5], "offset.flush.interval.ms", "1000",
            "decimal.handling.mode", "string", "tombstones.on.delete", "false",
            // The default of half a second is how long it waits for more records at most: latency counts here, too.
            "poll.interval.ms", "5",
        };
        for (int n = 0; n < all.length; n += 2) {
            settings.setProperty(all[n], all[n + 1]);
        }
        return settings;
    }
}
