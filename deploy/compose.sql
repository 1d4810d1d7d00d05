-- For docker-compose.yml only: a password for the role that migrations/002_role.sql creates. It protects a throwaway
-- database on your own machine; choose another one for anything else.
ALTER ROLE prefetchd PASSWORD 'prefetchd';
