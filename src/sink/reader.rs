//! Stand-in.
use super::SinkError;
use super::connect::{Address, RedisTarget};
use crate::command::Key;
use bytes::Bytes;
use std::time::{Duration, Instant};

#[derive(Clone)]
pub struct Reader {
    client: redis::Client,
    checkpoint: Key,
}

pub type Fields = Vec<(Bytes, Bytes)>;

pub struct Read {
    pub checkpoint: Option<Bytes>,
    pub rows: Vec<Option<Fields>>,
    pub ttl_ms: Vec<Option<u64>>,
    pub redis: Duration,
}

impl Reader {
    pub fn connect_lazy(target: &RedisTarget, checkpoint: Key) -> Result<Self, SinkError> {
        let url = match &target.address {
            Address::Tcp { host, port } => format!("redis://{host}:{port}/{}", target.db),
            Address::Unix(path) => format!("redis+unix://{}?db={}", path.display(), target.db),
        };
        let client = redis::Client::open(url).map_err(|e| SinkError(e.to_string()))?;
        Ok(Self { client, checkpoint })
    }

    pub async fn rows(&self, keys: &[Key]) -> Result<Read, SinkError> {
        let work = async {
            let mut c = self.client.get_multiplexed_async_connection().await?;
            let mut pipe = redis::pipe();
            pipe.atomic().cmd("GET").arg(self.checkpoint.as_bytes());
            for key in keys {
                pipe.cmd("HGETALL").arg(key.as_bytes()).cmd("PTTL").arg(key.as_bytes());
            }
            let started = Instant::now();
            let reply: Vec<redis::Value> = pipe.query_async(&mut c).await?;
            let redis = started.elapsed();
            let mut reply = reply.into_iter();
            let checkpoint: Option<Vec<u8>> = redis::from_redis_value(reply.next().expect("one per command"))?;
            let (mut rows, mut ttl_ms) = (vec![], vec![]);
            while let (Some(row), Some(ttl)) = (reply.next(), reply.next()) {
                let flat: Vec<Vec<u8>> = redis::from_redis_value(row)?;
                let fields: Fields = flat.chunks(2).map(|f| (f[0].clone().into(), f[1].clone().into())).collect();
                rows.push((!fields.is_empty()).then_some(fields));
                let ttl: i64 = redis::from_redis_value(ttl)?;
                ttl_ms.push(u64::try_from(ttl).ok());
            }
            Ok::<_, redis::RedisError>(Read { checkpoint: checkpoint.map(Bytes::from), rows, ttl_ms, redis })
        };
        match tokio::time::timeout(Duration::from_secs(1), work).await {
            Ok(done) => done.map_err(|e| SinkError(e.to_string())),
            Err(_) => Err(SinkError("Redis did not answer".to_owned())),
        }
    }
}
