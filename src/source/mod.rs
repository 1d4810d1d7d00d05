//! Postgres in, changes out.
pub mod assemble;
pub mod connect;
pub mod pgoutput;
pub mod slot;
pub mod snapshot;
pub mod stream;
pub mod wire;
