//! `bench powercut drive`: an image, served over NBD as a drive with a volatile write cache ([`super::cache`]).
//!
//! QEMU is the client and puts an NVMe controller before it. When the connection ends without a goodbye, because QEMU was
//! killed, that is the power cut (or it comes earlier, at a given command: `--cut-after`). With a goodbye, the machine was switched off, and the cache is written back.
//!
//! Of the NBD protocol (the "fixed newstyle" of its specification, <https://github.com/NetworkBlockDevice/nbd>) it speaks what
//! QEMU needs: one connection, one export, reads, writes, FUA and flushes.

use std::collections::{HashSet, VecDeque};
use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::cache::Cache;
use crate::failure::{Doing, Failure, Result};
use crate::out::Out;
use crate::units;

/// How long the drive waits for its machine.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);

const MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

/// Fixed newstyle, and no zeroes after an export's description.
const HANDSHAKE_FLAGS: u16 = 1 | 2;
const NO_ZEROES: u32 = 2;
/// Flags are there; flush and FUA are understood.
const TRANSMISSION_FLAGS: u16 = 1 | 4 | 8;

const OPTION_EXPORT_NAME: u32 = 1;
const OPTION_ABORT: u32 = 2;
const OPTION_INFO: u32 = 6;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_UNSUPPORTED: u32 = (1 << 31) | 1;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

const COMMAND_READ: u16 = 0;
const COMMAND_WRITE: u16 = 1;
const COMMAND_DISCONNECT: u16 = 2;
const COMMAND_FLUSH: u16 = 3;
const COMMAND_FUA: u16 = 1;

/// The longest request or option that is believed.
const LEN_MAX: u32 = 64 << 20;
const EIO: u32 = 5;
const EINVAL: u32 = 22;

/// Arguments of `bench powercut drive`.
#[derive(Debug, clap::Args)]
pub(super) struct DriveArgs {
    /// The image: what is on the medium
    #[arg(long, value_name = "FILE")]
    image: PathBuf,
    /// The Unix socket to make
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// What of the cache survives a power cut follows from this number
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Bytes that are never torn
    #[arg(long, value_name = "BYTES", default_value_t = 512)]
    sector: u32,
    /// How long a flush takes. While it lasts, what it is to make durable is not
    #[arg(long, value_name = "TIME", default_value = "2ms", value_parser = units::parse_time)]
    flush_time: Duration,
    /// Let the power fail when so many writes and flushes have come: the last is not answered, nor is anything after it
    #[arg(long, value_name = "N")]
    cut_after: Option<u64>,
    /// Acknowledge flushes and FUA without doing them, to see that it is noticed
    #[arg(long)]
    lie: bool,
    /// From this offset on, the first read or write that begins at an offset is answered late; everything else goes on
    #[arg(long, value_name = "OFFSET", value_parser = units::parse_bytes)]
    stall_from: Option<u64>,
    /// How late
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = units::parse_time)]
    stall_for: Duration,
}

/// How a connection ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// The client said goodbye.
    Goodbye,
    /// It did not.
    PowerCut,
}

/// Runs the command.
pub(super) fn run(args: &DriveArgs) -> Result<()> {
    if !args.sector.is_power_of_two() || !(512..=4096).contains(&args.sector) {
        return Err(Failure::Usage("--sector must be 512, 1024, 2048 or 4096".to_owned()));
    }
    let image = || format!("open the image '{}'", args.image.display());
    let medium = OpenOptions::new().read(true).write(true).open(&args.image).doing(image())?;
    let size = medium.metadata().doing(image())?.len();
    let mut cache = Cache::new(medium, args.sector as usize, args.lie);
    let mut stream = accept(args)?;
    let end = serve(&mut stream, &mut cache, size, args).doing("serve the image")?;
    let counts = cache.counts;
    let what = match end {
        End::Goodbye => {
            cache.write_back().doing("write the cache back")?;
            "switched off, cache written back".to_owned()
        }
        End::PowerCut => {
            let cut = cache.cut(args.seed).doing("write what survived")?;
            format!(
                "power cut: {} sectors of {} writes in the cache, {} of them survived ({:?})",
                cut.sectors, cut.writes, cut.kept, cut.survive
            )
        }
    };
    let mut out = Out::new(false);
    out.line(format!(
        "drive: {} reads, {} writes ({} with FUA), {} flushes; {what}",
        counts.reads, counts.writes, counts.fua_writes, counts.flushes
    ))?;
    out.flush()?;
    // A machine without power gets no answer, not even a broken connection, until it is killed itself.
    let _ = io::copy(&mut stream, &mut io::sink());
    Ok(())
}

/// Waits for the one connection.
fn accept(args: &DriveArgs) -> Result<UnixStream> {
    let what = || format!("listen at '{}'", args.socket.display());
    let listener = UnixListener::bind(&args.socket).doing(what())?;
    listener.set_nonblocking(true).doing(what())?;
    let started = Instant::now();
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).doing(what())?;
                let _ = std::fs::remove_file(&args.socket);
                return Ok(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if started.elapsed() > CONNECT_LIMIT {
                    return Err(Failure::new(format!(
                        "nobody connected within {} s",
                        CONNECT_LIMIT.as_secs()
                    )));
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error).doing(what()),
        }
    }
}

/// Serves one connection to its end.
fn serve(stream: &mut UnixStream, cache: &mut Cache, size: u64, args: &DriveArgs) -> io::Result<End> {
    let mut reader = BufReader::with_capacity(1 << 20, stream.try_clone()?);
    let served = handshake(&mut reader, stream, size, args.sector).and_then(|wanted| {
        if wanted { transmission(&mut reader, stream, cache, size, args) } else { Ok(End::Goodbye) }
    });
    match served {
        // A killed client resets the connection, or just ends it, wherever it was.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
            ) =>
        {
            Ok(End::PowerCut)
        }
        other => other,
    }
}

/// False when the client wants nothing more.
fn handshake(reader: &mut impl Read, stream: &mut UnixStream, size: u64, sector: u32) -> io::Result<bool> {
    let mut hello = Vec::from(MAGIC.to_be_bytes());
    hello.extend(OPTION_MAGIC.to_be_bytes());
    hello.extend(HANDSHAKE_FLAGS.to_be_bytes());
    stream.write_all(&hello)?;
    let client_flags = read_u32(reader)?;
    loop {
        if read_u64(reader)? != OPTION_MAGIC {
            return Err(garbage("an option without its magic number"));
        }
        let (option, len) = (read_u32(reader)?, read_u32(reader)?);
        if len > LEN_MAX {
            return Err(garbage("an option that is too long"));
        }
        io::copy(&mut reader.by_ref().take(u64::from(len)), &mut io::sink())?;
        let export = [&size.to_be_bytes()[..], &TRANSMISSION_FLAGS.to_be_bytes()].concat();
        match option {
            OPTION_EXPORT_NAME => {
                stream.write_all(&export)?;
                if client_flags & NO_ZEROES == 0 {
                    stream.write_all(&[0; 124])?;
                }
                return Ok(true);
            }
            OPTION_INFO | OPTION_GO => {
                let info = [&INFO_EXPORT.to_be_bytes()[..], &export].concat();
                stream.write_all(&option_reply(option, REPLY_INFO, &info))?;
                let mut sizes = Vec::from(INFO_BLOCK_SIZE.to_be_bytes());
                // Minimum, preferred, maximum.
                for bytes in [sector, 4096, LEN_MAX / 2] {
                    sizes.extend(bytes.to_be_bytes());
                }
                stream.write_all(&option_reply(option, REPLY_INFO, &sizes))?;
                stream.write_all(&option_reply(option, REPLY_ACK, &[]))?;
                if option == OPTION_GO {
                    return Ok(true);
                }
            }
            OPTION_ABORT => {
                stream.write_all(&option_reply(option, REPLY_ACK, &[]))?;
                return Ok(false);
            }
            _ => stream.write_all(&option_reply(option, REPLY_UNSUPPORTED, &[]))?,
        }
    }
}

fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut reply = Vec::from(OPTION_REPLY_MAGIC.to_be_bytes());
    for field in [option, kind, data.len() as u32] {
        reply.extend(field.to_be_bytes());
    }
    reply.extend(data);
    reply
}

fn transmission(
    reader: &mut BufReader<UnixStream>,
    stream: &mut UnixStream,
    cache: &mut Cache,
    size: u64,
    args: &DriveArgs,
) -> io::Result<End> {
    let (mut data, mut stalls) = (Vec::new(), Stalls::default());
    loop {
        stalls.answer_until_request(reader, stream)?;
        if read_u32(reader)? != REQUEST_MAGIC {
            return Err(garbage("a request without its magic number"));
        }
        let (flags, command) = (read_u16(reader)?, read_u16(reader)?);
        let (cookie, offset, len) = (read_u64(reader)?, read_u64(reader)?, read_u32(reader)?);
        if len > LEN_MAX {
            return Err(garbage("a request that is too long"));
        }
        data.resize(len as usize, 0);
        if command == COMMAND_WRITE {
            // Whole, before any of it is in the cache: a request that was cut off never came.
            reader.read_exact(&mut data)?;
        }
        let aligned = (offset | u64::from(len)) & u64::from(args.sector - 1) == 0;
        let inside = offset.checked_add(u64::from(len)).is_some_and(|end| end <= size);
        let last = matches!(command, COMMAND_WRITE | COMMAND_FLUSH)
            && args.cut_after == Some(cache.counts.writes + cache.counts.flushes + 1);
        if last && command == COMMAND_FLUSH {
            return Ok(End::PowerCut);
        }
        let done = match command {
            COMMAND_DISCONNECT => return Ok(End::Goodbye),
            COMMAND_FLUSH => {
                if !powered(reader, args.flush_time)? {
                    return Ok(End::PowerCut);
                }
                cache.flush().map_err(|_| EIO)
            }
            _ if !aligned || !inside => Err(EINVAL),
            COMMAND_READ => cache.read(offset, &mut data).map_err(|_| EIO),
            COMMAND_WRITE => cache.write(offset, &data, flags & COMMAND_FUA != 0).map_err(|_| EIO),
            _ => Err(EINVAL),
        };
        if last {
            return Ok(End::PowerCut);
        }
        let mut reply = Vec::from(REPLY_MAGIC.to_be_bytes());
        reply.extend(done.err().unwrap_or(0).to_be_bytes());
        reply.extend(cookie.to_be_bytes());
        if command == COMMAND_READ && done.is_ok() {
            reply.extend(&data);
        }
        let stalls_at = args.stall_from.is_some_and(|from| offset >= from) && command != COMMAND_FLUSH;
        if stalls_at && stalls.known.insert(offset) {
            stalls.late.push_back((Instant::now() + args.stall_for, reply));
        } else {
            stream.write_all(&reply)?;
        }
    }
}

/// Answers that are held back.
#[derive(Default)]
struct Stalls {
    /// Offsets that have had their stall.
    known: HashSet<u64>,
    /// Answers in order, and when they are due.
    late: VecDeque<(Instant, Vec<u8>)>,
}

impl Stalls {
    /// Sends each when it is due, until there is a request (or the end of the connection).
    fn answer_until_request(
        &mut self,
        reader: &mut BufReader<UnixStream>,
        stream: &mut UnixStream,
    ) -> io::Result<()> {
        while let Some((due, _)) = self.late.front() {
            let left = due.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                if input_within(reader, left)?.is_some() {
                    return Ok(());
                }
            } else if let Some((_, reply)) = self.late.pop_front() {
                stream.write_all(&reply)?;
            }
        }
        Ok(())
    }
}

/// Whether there are more bytes from the client (true) or none any more (false); nothing, if neither is so within the time.
fn input_within(reader: &mut BufReader<UnixStream>, time: Duration) -> io::Result<Option<bool>> {
    reader.get_ref().set_read_timeout(Some(time))?;
    let input = match reader.fill_buf() {
        Ok(waiting) => Some(!waiting.is_empty()),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => None,
        Err(error) => return Err(error),
    };
    reader.get_ref().set_read_timeout(None)?;
    Ok(input)
}

/// Waits for as long as a flush takes. False when the power fails meanwhile.
fn powered(reader: &mut BufReader<UnixStream>, time: Duration) -> io::Result<bool> {
    let started = Instant::now();
    if !time.is_zero() {
        if input_within(reader, time)? == Some(false) {
            return Ok(false);
        }
        std::thread::sleep(time.saturating_sub(started.elapsed()));
    }
    Ok(true)
}

fn garbage(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the client sent {what}"))
}

fn read_u16(reader: &mut impl Read) -> io::Result<u16> {
    let mut bytes = [0; 2];
    reader.read_exact(&mut bytes)?;
    Ok(u16::from_be_bytes(bytes))
}

fn read_u32(reader: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    reader.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn read_u64(reader: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    reader.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}
