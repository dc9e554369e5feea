//! Asks a target on the network, before SPDK does, whether it is there and would have us: SPDK's driver waits long for one
//! that is not, and does not say what was wrong.
//!
//! Over TCP that is the beginning of the NVMe/TCP protocol (NVMe TCP Transport Specification 1.0, 3.6: initialize connection
//! request and response; NVMe over Fabrics 1.1, 3.3: connect command), after which the connection is closed.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

use crate::Error;
use crate::uri::{Fabric, NvmeAddress, NvmeOptions};

/// How long the target may take for each step.
const PATIENCE: Duration = Duration::from_secs(3);

/// Where a target listens.
#[derive(Debug, Clone, Copy)]
pub(super) struct Endpoint {
    pub(super) address: SocketAddr,
}

/// The address behind a name.
pub(super) fn resolve(host: &str, port: u16, uri: &str) -> Result<Endpoint, Error> {
    let why = match (host, port).to_socket_addrs() {
        Ok(mut addresses) => match addresses.next() {
            Some(address) => return Ok(Endpoint { address }),
            None => "it has no address".to_owned(),
        },
        Err(error) => error.to_string(),
    };
    Err(Error::NotFound { device: uri.to_owned(), why: format!("host '{host}': {why}") })
}

/// Whether the target would let us connect.
///
/// # Errors
/// [`Error::NotFound`] when nobody listens, or the subsystem is unknown there; [`Error::Unavailable`] when it does not
/// answer; [`Error::NotPermitted`] when the host may not connect; [`Error::NotADevice`] when what answers is no NVMe target.
pub(super) fn check(endpoint: &Endpoint, options: &NvmeOptions, uri: &str) -> Result<(), Error> {
    let NvmeAddress::Fabric { kind: Fabric::Tcp, nqn, .. } = &options.address else { return Ok(()) };
    let host_nqn = options
        .host_nqn
        .as_deref()
        .unwrap_or("nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-000000000000");
    let device = || uri.to_owned();
    let address = endpoint.address;
    match ask(address, nqn, host_nqn) {
        Ok(()) => Ok(()),
        Err(Trouble::Refused) => {
            let why = format!("nobody listens at {address}; start the target, or correct the address");
            Err(Error::NotFound { device: device(), why })
        }
        Err(Trouble::Silent(step)) => {
            let why = format!("{address} does not answer ({step}, {} s)", PATIENCE.as_secs());
            Err(Error::Unavailable { device: device(), why })
        }
        Err(Trouble::Garbage(what)) => {
            let why = format!("what listens at {address} is no NVMe/TCP target: {what}");
            Err(Error::NotADevice { device: device(), why })
        }
        Err(Trouble::Io(source)) => Err(Error::Os { what: "cannot reach", device: device(), source }),
        Err(Trouble::Status { sct: 1, sc: 0x82 }) => {
            let why = format!("the target at {address} has no subsystem {nqn}");
            Err(Error::NotFound { device: device(), why })
        }
        Err(Trouble::Status { sct: 1, sc: 0x84 }) => {
            // SPDK's target answers both of these with "invalid host".
            let why = format!(
                "the subsystem does not let this host in, or not at {address}; have the target allow the host \
                 (its name is {host_nqn}; ?hostnqn=NQN gives another) and listen there for this subsystem"
            );
            Err(Error::NotPermitted { device: device(), why })
        }
        Err(Trouble::Status { sct: 1, sc: 0x81 }) => Err(Error::Busy { device: device() }),
        Err(Trouble::Status { sct, sc }) => {
            let why =
                format!("the subsystem refuses the connection with NVMe status sct={sct:#x} sc={sc:#x}");
            Err(Error::NotADevice { device: device(), why })
        }
    }
}

enum Trouble {
    Refused,
    Silent(&'static str),
    Garbage(String),
    Io(io::Error),
    Status { sct: u8, sc: u8 },
}

mod pdu {
    pub(super) const IC_REQ: u8 = 0x00;
    pub(super) const IC_RESP: u8 = 0x01;
    pub(super) const CAPSULE_CMD: u8 = 0x04;
    pub(super) const CAPSULE_RESP: u8 = 0x05;
    /// Length of both initialize PDUs.
    pub(super) const IC_LEN: usize = 128;
    /// Common header and submission queue entry.
    pub(super) const COMMAND_LEN: usize = 8 + 64;
    /// Common header and completion queue entry.
    pub(super) const RESPONSE_LEN: usize = 8 + 16;
}

/// Length of the connect command's data.
const CONNECT_DATA: usize = 1024;

fn ask(address: SocketAddr, nqn: &str, host_nqn: &str) -> Result<(), Trouble> {
    let classify = |step: &'static str| {
        move |error: io::Error| match error.kind() {
            io::ErrorKind::ConnectionRefused => Trouble::Refused,
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Trouble::Silent(step),
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe => Trouble::Garbage(format!("it closes the connection ({step})")),
            _ => Trouble::Io(error),
        }
    };
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).map_err(classify("connecting"))?;
    let limits =
        stream.set_read_timeout(Some(PATIENCE)).and_then(|()| stream.set_write_timeout(Some(PATIENCE)));
    limits.and_then(|()| stream.set_nodelay(true)).map_err(Trouble::Io)?;

    let mut request = [0u8; pdu::IC_LEN];
    header(&mut request, pdu::IC_REQ, pdu::IC_LEN as u8, 0, pdu::IC_LEN as u32);
    let step = "initialize connection";
    stream.write_all(&request).map_err(classify(step))?;
    let mut response = [0u8; pdu::IC_LEN];
    stream.read_exact(&mut response[..8]).map_err(classify(step))?;
    if (response[0], usize::from(response[2])) != (pdu::IC_RESP, pdu::IC_LEN) {
        return Err(Trouble::Garbage(format!("it answers with {:02x?}", &response[..8])));
    }
    stream.read_exact(&mut response[8..]).map_err(classify(step))?;
    // Data in a capsule begins at a multiple of (CPDA + 1) words.
    let alignment = (usize::from(response[10]) + 1) * 4;
    let data_at = pdu::COMMAND_LEN.div_ceil(alignment) * alignment;

    let step = "connect command";
    let capsule = connect_capsule(data_at, nqn, host_nqn);
    stream.write_all(&capsule).map_err(classify(step))?;
    let mut response = [0u8; pdu::RESPONSE_LEN];
    stream.read_exact(&mut response).map_err(classify(step))?;
    if response[0] != pdu::CAPSULE_RESP {
        return Err(Trouble::Garbage(format!("it answers a command with {:02x?}", &response[..8])));
    }
    let status = u16::from_le_bytes([response[22], response[23]]) >> 1;
    match (status as u8, (status >> 8 & 7) as u8) {
        (0, 0) => Ok(()),
        (sc, sct) => Err(Trouble::Status { sct, sc }),
    }
}

/// The common header of a PDU.
fn header(buffer: &mut [u8], kind: u8, header_len: u8, data_at: u8, len: u32) {
    buffer[0] = kind;
    buffer[2] = header_len;
    buffer[3] = data_at;
    buffer[4..8].copy_from_slice(&len.to_le_bytes());
}

fn connect_capsule(data_at: usize, nqn: &str, host_nqn: &str) -> Vec<u8> {
    let mut capsule = vec![0u8; data_at + CONNECT_DATA];
    let len = capsule.len() as u32;
    header(&mut capsule, pdu::CAPSULE_CMD, pdu::COMMAND_LEN as u8, data_at as u8, len);
    let command = &mut capsule[8..pdu::COMMAND_LEN];
    // Fabrics command, data by SGL, connect.
    (command[0], command[1], command[4]) = (0x7f, 0x40, 0x01);
    // SGL descriptor: offset 0 in the capsule's data.
    command[32..36].copy_from_slice(&(CONNECT_DATA as u32).to_le_bytes());
    command[39] = 0x01;
    // Admin queue of 32 entries (counted from 0); no keep-alive: the connection ends at once.
    command[44..46].copy_from_slice(&31u16.to_le_bytes());
    let data = &mut capsule[data_at..];
    // Host identifier: from the name, so that it is the same each time.
    for (at, byte) in host_nqn.bytes().enumerate() {
        data[at % 16] = data[at % 16].wrapping_mul(31).wrapping_add(byte);
    }
    // Any controller.
    data[16..18].copy_from_slice(&0xffffu16.to_le_bytes());
    // Both names fit in their 256 bytes with their end: at most 223 each (`uri::nvme`).
    data[256..256 + nqn.len()].copy_from_slice(nqn.as_bytes());
    data[512..512 + host_nqn.len()].copy_from_slice(host_nqn.as_bytes());
    capsule
}
