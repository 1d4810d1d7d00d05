-- For docker-compose.yml only: a password for the role that migrations/002_role.sql makes. It guards a throwaway
-- database on your own machine; choose another for anything else.
ALTER ROLE prefetchd PASSWORD 'prefetchd';
