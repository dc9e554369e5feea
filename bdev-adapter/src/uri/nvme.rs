//! `spdk-nvme:`: the address of an NVMe controller, a namespace of it, and how it is driven.

use std::time::Duration;

use super::{Parsed, decode, parse_depth, unknown_option};

const RIGHT: &str =
    "spdk-nvme:pcie:0000:00:04.0 or spdk-nvme:tcp:127.0.0.1:4420/nqn.2016-06.io.spdk:disk?ns=1";

/// What `spdk-nvme:` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvmeOptions {
    /// Where the controller is.
    pub address: NvmeAddress,
    /// Namespace id; none for the only one that there is.
    pub namespace: Option<u32>,
    /// NVMe qualified name by which the host makes itself known (fabrics); none for one that SPDK makes up.
    pub host_nqn: Option<String>,
    /// Commands in flight per queue pair.
    pub depth: u32,
    /// How long the device may take for one command; after that it is aborted, and if that does not help the
    /// controller is reset.
    pub timeout: Duration,
    /// How long a controller that was lost is waited for before it counts as gone.
    pub reconnect: Duration,
    /// A write with FUA is that for the device. Otherwise it is a write and a flush: for devices that ignore FUA, as QEMU's
    /// emulated controller does.
    pub native_fua: bool,
    /// CRC32C over headers and data on the wire (TCP).
    pub digest: bool,
}

/// The address of a controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NvmeAddress {
    /// A local controller: `0000:00:04.0` (domain, bus, device, function).
    Pcie(String),
    /// A subsystem of a target on the network.
    Fabric {
        /// How it is reached.
        kind: Fabric,
        /// Name or IP address.
        host: String,
        /// TCP (or RDMA) port.
        port: u16,
        /// NVMe qualified name of the subsystem.
        nqn: String,
    },
}

/// An NVMe transport over a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fabric {
    /// NVMe/TCP.
    Tcp,
    /// NVMe/RDMA; needs an SPDK that was built with it.
    Rdma,
}

/// Parses what follows `spdk-nvme:`.
pub(super) fn parse(body: &str, options: &[(&str, &str)]) -> Parsed<NvmeOptions> {
    let address = match body.split_once(':') {
        Some(("pcie", address)) => NvmeAddress::Pcie(pci_address(address)?),
        Some(("tcp", rest)) => fabric(Fabric::Tcp, rest)?,
        Some(("rdma", rest)) => fabric(Fabric::Rdma, rest)?,
        Some((transport, _)) => {
            return Err(format!("unknown NVMe transport '{transport}' (pcie, tcp, rdma); write {RIGHT}"));
        }
        None => return Err(format!("'{body}' is no NVMe address; write {RIGHT}")),
    };
    let mut nvme = NvmeOptions {
        address,
        namespace: None,
        host_nqn: None,
        depth: 127,
        timeout: Duration::from_secs(30),
        reconnect: Duration::from_secs(60),
        native_fua: true,
        digest: false,
    };
    let fabric = matches!(nvme.address, NvmeAddress::Fabric { .. });
    for (key, value) in options {
        match *key {
            "ns" => match value.parse() {
                Ok(ns @ 1..=0xFFFF_FFFE) => nvme.namespace = Some(ns),
                _ => return Err(format!("'{value}' is not a namespace id; write ns=1")),
            },
            "depth" => nvme.depth = parse_depth(value)?,
            "timeout" => nvme.timeout = parse_duration(key, value)?,
            "reconnect" => nvme.reconnect = parse_duration(key, value)?,
            "fua" => {
                nvme.native_fua = match *value {
                    "on" => true,
                    "flush" => false,
                    _ => return Err(format!("fua='{value}' is unknown; write fua=on or fua=flush")),
                }
            }
            "hostnqn" if fabric => nvme.host_nqn = Some(nqn(value)?),
            "digest" if fabric => {
                nvme.digest = match *value {
                    "on" => true,
                    "off" => false,
                    _ => return Err(format!("digest='{value}' is unknown; write digest=on or off")),
                }
            }
            "hostnqn" | "digest" => return Err(format!("option '{key}' is for tcp and rdma only")),
            _ => {
                let known = "ns, depth, timeout, reconnect, fua, hostnqn, digest";
                return Err(unknown_option("spdk-nvme", key, known, RIGHT));
            }
        }
    }
    Ok(nvme)
}

/// `0000:00:04.0`, or without its domain.
fn pci_address(text: &str) -> Parsed<String> {
    let wrong = || format!("'{text}' is not a PCI address; write pcie:0000:00:04.0");
    let full = if text.matches(':').count() == 1 { format!("0000:{text}") } else { text.to_owned() };
    let (slot, function) = full.split_once('.').ok_or_else(wrong)?;
    let parts: Vec<&str> = slot.split(':').collect();
    let hex = |part: &str, digits: std::ops::RangeInclusive<usize>| {
        digits.contains(&part.len()) && part.bytes().all(|b| b.is_ascii_hexdigit())
    };
    match parts[..] {
        [domain, bus, device]
            if hex(domain, 4..=8)
                && hex(bus, 2..=2)
                && hex(device, 2..=2)
                && function.len() == 1
                && function.bytes().all(|b| (b'0'..=b'7').contains(&b)) =>
        {
            Ok(full.to_ascii_lowercase())
        }
        _ => Err(wrong()),
    }
}

/// `HOST:PORT/NQN`; an IPv6 address in brackets.
fn fabric(kind: Fabric, text: &str) -> Parsed<NvmeAddress> {
    let Some((endpoint, subsystem)) = text.split_once('/') else {
        return Err(format!("'{text}' names no subsystem; write {RIGHT}"));
    };
    let Some((host, port)) = endpoint.rsplit_once(':') else {
        return Err(format!("'{endpoint}' has no port; write 127.0.0.1:4420"));
    };
    let host = match host.strip_prefix('[') {
        Some(rest) => rest
            .strip_suffix(']')
            .ok_or_else(|| format!("'{host}' has no closing bracket; write [::1]:4420"))?,
        None if host.contains(':') => {
            return Err(format!("an IPv6 address needs brackets; write [{host}]:{port}"));
        }
        None => host,
    };
    let name = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:".contains(&byte);
    if host.is_empty() || !host.bytes().all(name) {
        return Err(format!("'{host}' is not a host; write 127.0.0.1:4420"));
    }
    let port = match port.parse() {
        Ok(port @ 1..) => port,
        _ => return Err(format!("'{port}' is not a port; write {host}:4420")),
    };
    Ok(NvmeAddress::Fabric { kind, host: host.to_owned(), port, nqn: nqn(subsystem)? })
}

/// An NVMe qualified name: at most 223 bytes (NVMe Base Specification, 4.5).
fn nqn(text: &str) -> Parsed<String> {
    let decoded = String::from_utf8(decode(text)?).map_err(|_| format!("'{text}' is not UTF-8"))?;
    let good = decoded.starts_with("nqn.")
        && decoded.len() <= 223
        && decoded.bytes().all(|byte| byte.is_ascii_graphic());
    if good {
        Ok(decoded)
    } else {
        Err(format!("'{text}' is not an NVMe qualified name; write nqn.2016-06.io.spdk:disk"))
    }
}

/// `30s`, `500ms`: positive, at most a day.
fn parse_duration(key: &str, text: &str) -> Parsed<Duration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let millis = match unit {
        "s" => 1000,
        "ms" => 1,
        _ => 0,
    };
    match number.parse::<u64>().ok().and_then(|number| number.checked_mul(millis)) {
        Some(millis @ 1..=86_400_000) => Ok(Duration::from_millis(millis)),
        _ => Err(format!("'{text}' is not a time; write {key}=30s or {key}=500ms")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Backend, DeviceUri};
    use super::*;

    fn options(uri: &str) -> NvmeOptions {
        match DeviceUri::parse(uri).unwrap().backend() {
            Backend::SpdkNvme(nvme) => nvme.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn addresses() {
        let pcie = |text: &str| NvmeAddress::Pcie(text.to_owned());
        assert_eq!(options("spdk-nvme:pcie:0000:00:04.0").address, pcie("0000:00:04.0"));
        assert_eq!(options("spdk-nvme:pcie:C1:1f.7").address, pcie("0000:c1:1f.7"));
        let nvme = options("spdk-nvme:tcp:127.0.0.1:4420/nqn.2016-06.io.spdk:a?ns=2&digest=on&timeout=5s");
        let tcp = |host: &str, nqn: &str| NvmeAddress::Fabric {
            kind: Fabric::Tcp,
            host: host.into(),
            port: 4420,
            nqn: nqn.into(),
        };
        assert_eq!(nvme.address, tcp("127.0.0.1", "nqn.2016-06.io.spdk:a"));
        assert_eq!((nvme.namespace, nvme.digest), (Some(2), true));
        assert_eq!((nvme.timeout, nvme.reconnect), (Duration::from_secs(5), Duration::from_secs(60)));
        assert_eq!(options("spdk-nvme:tcp:[::1]:4420/nqn.x").address, tcp("::1", "nqn.x"));
        let rest = "?ns=1&depth=32&reconnect=500ms&hostnqn=nqn.2014-08.org:h";
        let nvme = options(&format!("spdk-nvme:tcp:host-1.lan:4420/nqn.x{rest}"));
        assert_eq!(nvme.host_nqn.as_deref(), Some("nqn.2014-08.org:h"));
        assert_eq!((nvme.depth, nvme.reconnect, nvme.native_fua), (32, Duration::from_millis(500), true));
        assert!(!options("spdk-nvme:pcie:0000:00:04.0?fua=flush").native_fua);
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (uri, why) in [
            ("spdk-nvme:", "no NVMe address"),
            ("spdk-nvme:pcie", "no NVMe address"),
            ("spdk-nvme:usb:1", "unknown NVMe transport 'usb'"),
            ("spdk-nvme:pcie:", "not a PCI address"),
            ("spdk-nvme:pcie:0000:00:04", "not a PCI address"),
            ("spdk-nvme:pcie:0000:00:04.8", "not a PCI address"),
            ("spdk-nvme:pcie:0000:00:04.0.1", "not a PCI address"),
            ("spdk-nvme:pcie:00x0:00:04.0", "not a PCI address"),
            ("spdk-nvme:pcie:0000:00:04.0?ns=0", "not a namespace id"),
            ("spdk-nvme:pcie:0000:00:04.0?ns=4294967295", "not a namespace id"),
            ("spdk-nvme:pcie:0000:00:04.0?digest=on", "for tcp and rdma only"),
            ("spdk-nvme:pcie:0000:00:04.0?hostnqn=nqn.a", "for tcp and rdma only"),
            ("spdk-nvme:pcie:0000:00:04.0?fua=off", "fua='off' is unknown"),
            ("spdk-nvme:pcie:0000:00:04.0?lba=1", "has no option 'lba'"),
            ("spdk-nvme:pcie:0000:00:04.0?timeout=0s", "not a time"),
            ("spdk-nvme:pcie:0000:00:04.0?timeout=5", "not a time"),
            ("spdk-nvme:pcie:0000:00:04.0?reconnect=99999999999999999999s", "not a time"),
            ("spdk-nvme:pcie:0000:00:04.0?depth=0", "not a queue depth"),
            ("spdk-nvme:pcie:0000:00:04.0?ns=1&ns=2", "given twice"),
            ("spdk-nvme:tcp:127.0.0.1:4420", "names no subsystem"),
            ("spdk-nvme:tcp:127.0.0.1/nqn.a", "has no port"),
            ("spdk-nvme:tcp:127.0.0.1:0/nqn.a", "not a port"),
            ("spdk-nvme:tcp:127.0.0.1:65536/nqn.a", "not a port"),
            ("spdk-nvme:tcp:::1:4420/nqn.a", "needs brackets"),
            ("spdk-nvme:tcp:[::1:4420/nqn.a", "no closing bracket"),
            ("spdk-nvme:tcp::4420/nqn.a", "not a host"),
            ("spdk-nvme:tcp:a b:4420/nqn.a", "not a host"),
            ("spdk-nvme:tcp:127.0.0.1:4420/", "not an NVMe qualified name"),
            ("spdk-nvme:tcp:127.0.0.1:4420/iqn.a", "not an NVMe qualified name"),
            ("spdk-nvme:tcp:127.0.0.1:4420/nqn.a%00b", "not an NVMe qualified name"),
            ("spdk-nvme:tcp:127.0.0.1:4420/nqn.a?digest=1", "digest='1' is unknown"),
        ] {
            let error = DeviceUri::parse(uri).expect_err(uri).to_string();
            assert!(error.contains(why), "{uri}: {error}");
        }
        let long = format!("spdk-nvme:tcp:h:1/nqn.{}", "a".repeat(220));
        assert!(DeviceUri::parse(&long).is_err());
    }
}
