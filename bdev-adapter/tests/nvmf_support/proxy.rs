//! A TCP proxy that cuts connections.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// Forwards connections to a port until it is dropped.
pub(crate) struct Proxy {
    pub(crate) port: u16,
    state: Arc<State>,
}

struct State {
    target: u16,
    closed: AtomicBool,
    /// Bytes from the target after which a connection is cut; `u64::MAX`: never.
    limit: AtomicU64,
    connections: Mutex<Vec<(TcpStream, TcpStream)>>,
    cuts: AtomicU64,
}

impl Proxy {
    pub(crate) fn new(target: u16) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(State {
            target,
            closed: AtomicBool::new(false),
            limit: AtomicU64::new(u64::MAX),
            connections: Mutex::default(),
            cuts: AtomicU64::new(0),
        });
        let accepting = Arc::clone(&state);
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if accepting.closed.load(Ordering::Acquire) {
                    return;
                }
                accepting.forward(client);
            }
        });
        Proxy { port, state }
    }

    /// Cuts each connection after so many bytes from the target.
    pub(crate) fn cut_after(&self, bytes: u64) {
        self.state.limit.store(bytes, Ordering::Release);
    }

    /// Cuts all connections that there are now.
    pub(crate) fn cut(&self) {
        for (client, target) in self.state.connections.lock().unwrap().drain(..) {
            let _ = client.shutdown(Shutdown::Both);
            let _ = target.shutdown(Shutdown::Both);
            self.state.cuts.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Connections that were cut.
    pub(crate) fn cuts(&self) -> u64 {
        self.state.cuts.load(Ordering::Relaxed)
    }
}

impl State {
    fn forward(self: &Arc<State>, client: TcpStream) {
        let Ok(target) = TcpStream::connect(("127.0.0.1", self.target)) else { return };
        client.set_nodelay(true).unwrap();
        target.set_nodelay(true).unwrap();
        let pair = (client.try_clone().unwrap(), target.try_clone().unwrap());
        self.connections.lock().unwrap().push(pair);
        let (from_client, to_target) = (client.try_clone().unwrap(), target.try_clone().unwrap());
        thread::spawn(move || pump(from_client, to_target, || u64::MAX, || {}));
        let state = Arc::clone(self);
        thread::spawn(move || {
            let limit = || state.limit.load(Ordering::Acquire);
            pump(target, client, limit, || {
                state.cuts.fetch_add(1, Ordering::Relaxed);
            });
        });
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream, limit: impl Fn() -> u64, cut: impl Fn()) {
    let (mut buffer, mut total) = (vec![0; 64 << 10], 0u64);
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let rest = limit().saturating_sub(total).min(count as u64) as usize;
        if to.write_all(&buffer[..rest]).is_err() {
            break;
        }
        total += count as u64;
        if rest < count {
            cut();
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.closed.store(true, Ordering::Release);
        self.cut();
        // Wakes the listener.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}
