//! Stand-in.
#[derive(Clone)]
pub struct RedisTarget {
    pub address: Address,
    pub db: u32,
    pub user: Option<String>,
    pub password: Option<String>,
}
#[derive(Clone)]
pub enum Address {
    Tcp { host: String, port: u16 },
    Unix(std::path::PathBuf),
}
