//! Listeners that are no NVMe/TCP targets, or bad ones.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

/// What an impostor does with a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Impostor {
    /// Closes it at once.
    Closes,
    /// Says nothing.
    Silent,
    /// Speaks another protocol.
    Http,
    /// Answers the initialize request, then closes.
    ClosesAfterInit,
    /// Answers the initialize request, and everything that follows with noise.
    NoiseAfterInit,
    /// Refuses the connect command with this status (type, code).
    Refuses(u8, u8),
    /// Accepts the connect command, then says nothing more.
    SilentAfterConnect,
    /// Accepts the connect command, then sends noise.
    NoiseAfterConnect,
    /// Accepts the connect command, and completes every other with success and zeroes, whether it was asked or not.
    YesMan,
}

impl Impostor {
    /// Starts it; its port. It lives until the test program ends.
    pub(crate) fn start(self) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                // The other side closes whenever it likes.
                thread::spawn(move || drop(self.serve(stream)));
            }
        });
        port
    }

    fn serve(self, mut stream: TcpStream) -> std::io::Result<()> {
        let nap = || thread::sleep(Duration::from_secs(120));
        match self {
            Impostor::Closes => return Ok(()),
            Impostor::Silent => {
                nap();
                return Ok(());
            }
            Impostor::Http => {
                stream.read_exact(&mut [0; 128])?;
                stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")?;
                nap();
                return Ok(());
            }
            _ => {}
        }
        stream.read_exact(&mut [0; 128])?;
        let mut init = [0u8; 128];
        (init[0], init[2], init[4]) = (0x01, 128, 128);
        // Largest data PDU from the host.
        init[12..16].copy_from_slice(&131_072u32.to_le_bytes());
        stream.write_all(&init)?;
        let mut connect = [0u8; 72 + 1024];
        match self {
            Impostor::ClosesAfterInit => return Ok(()),
            Impostor::NoiseAfterInit => return noise(stream),
            _ => stream.read_exact(&mut connect)?,
        }
        let cid = [connect[10], connect[11]];
        match self {
            Impostor::Refuses(sct, sc) => {
                stream.write_all(&response(cid, u16::from(sct) << 8 | u16::from(sc), 0))?;
                nap();
            }
            Impostor::SilentAfterConnect => {
                stream.write_all(&response(cid, 0, 1))?;
                nap();
            }
            Impostor::NoiseAfterConnect => {
                stream.write_all(&response(cid, 0, 1))?;
                return noise(stream);
            }
            _ => {
                stream.write_all(&response(cid, 0, 1))?;
                let mut capsule = [0u8; 72];
                loop {
                    stream.read_exact(&mut capsule)?;
                    stream.write_all(&response([capsule[10], capsule[11]], 0, 0))?;
                }
            }
        }
        Ok(())
    }
}

/// A response capsule.
fn response(cid: [u8; 2], status: u16, dword0: u32) -> [u8; 24] {
    let mut pdu = [0u8; 24];
    (pdu[0], pdu[2], pdu[4]) = (0x05, 24, 24);
    pdu[8..12].copy_from_slice(&dword0.to_le_bytes());
    pdu[20..22].copy_from_slice(&cid);
    pdu[22..24].copy_from_slice(&(status << 1).to_le_bytes());
    pdu
}

/// Pseudo-random bytes without end, the same each time.
fn noise(mut stream: TcpStream) -> std::io::Result<()> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut buffer = [0u8; 4096];
    loop {
        for byte in &mut buffer {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = state as u8;
        }
        stream.write_all(&buffer)?;
    }
}
