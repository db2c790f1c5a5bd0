//! A TCP proxy that cuts connections after a number of bytes, by seed: sometimes with a reset, sometimes with an end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Result;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::noise::mix;

pub struct Proxy {
    pub address: SocketAddr,
    cut: Arc<AtomicU64>,
    _tasks: JoinSet<()>,
}

/// The first `cuts` connections that carry enough are cut after a number of answer bytes between `least` and `most`.
#[derive(Debug, Clone, Copy)]
pub struct Cuts {
    pub seed: u64,
    pub cuts: u64,
    pub least: u64,
    pub most: u64,
}

impl Proxy {
    pub async fn start(upstream: SocketAddr, plan: Cuts) -> Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let cut = Arc::new(AtomicU64::new(0));
        let mut tasks = JoinSet::new();
        let counter = cut.clone();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            let mut number = 0;
            while let Ok((client, _)) = listener.accept().await {
                number += 1;
                connections.spawn(carry(client, upstream, plan, number, counter.clone()));
            }
        });
        Ok(Proxy { address, cut, _tasks: tasks })
    }

    /// Connections cut so far.
    pub fn cuts_made(&self) -> u64 {
        self.cut.load(Ordering::SeqCst)
    }
}

async fn carry(client: TcpStream, upstream: SocketAddr, plan: Cuts, number: u64, counter: Arc<AtomicU64>) {
    let Ok(server) = TcpStream::connect(upstream).await else { return };
    let dice = mix(plan.seed ^ mix(number));
    let mut left = plan.least + dice % (plan.most - plan.least).max(1);
    let reset = dice & (1 << 40) != 0;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let mut up = vec![0; 64 << 10];
    let mut down = vec![0; 64 << 10];
    loop {
        tokio::select! {
            biased;
            read = from_client.read(&mut up) => match read {
                Ok(n) if n > 0 && to_server.write_all(&up[..n]).await.is_ok() => {}
                Ok(_) | Err(_) => return,
            },
            read = from_server.read(&mut down) => {
                let n = match read {
                    Ok(n) if n > 0 => n,
                    Ok(_) | Err(_) => return,
                };
                let open = counter.load(Ordering::SeqCst) < plan.cuts;
                let send = if open { n.min(usize::try_from(left).unwrap_or(n)) } else { n };
                if to_client.write_all(&down[..send]).await.is_err() {
                    return;
                }
                left = left.saturating_sub(send as u64);
                if open && left == 0 {
                    counter.fetch_add(1, Ordering::SeqCst);
                    if reset && let Ok(whole) = from_client.reunite(to_client) {
                        // An immediate reset instead of an orderly end.
                        let _ = whole.set_zero_linger();
                    }
                    return;
                }
            }
        }
    }
}
