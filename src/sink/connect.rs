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
impl RedisTarget {
    pub fn parse(url: &str) -> Result<Self, String> {
        let path = url.strip_prefix("unix://").ok_or("unix only")?;
        Ok(Self { address: Address::Unix(path.into()), db: 0, user: None, password: None })
    }
}
