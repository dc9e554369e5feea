//! Why an NVMe controller on PCIe cannot be had, and the command that mends it.
//!
//! SPDK says "no controller" for every reason there is, so what stands in the way is looked up in sysfs: before an attach
//! it costs a few file reads, after a failed one it makes the message. Nothing here changes anything.
//!
//! An [`Obstacle`] is the first thing that must be mended, in the order in which a user meets them. `None` means that
//! nothing was found, not that an attach will succeed.

use std::ffi::CString;
use std::fmt;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The PCI class of controllers that SPDK's driver takes: mass storage, non-volatile memory, NVM Express.
const NVME_CLASS: u32 = 0x01_08_02;

/// What a user may pin for DMA without root, below which VFIO is sure to fail: SPDK's own pools alone are larger.
const PINNED_BYTES_NEEDED: u64 = 512 << 20;

/// The address of a PCI function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Bdf {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl fmt::Display for Bdf {
    /// As the kernel writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

impl FromStr for Bdf {
    type Err = ();

    /// `DDDD:BB:DD.F` or `BB:DD.F`, hexadecimal; SPDK also takes a dot for each colon.
    fn from_str(text: &str) -> Result<Bdf, ()> {
        // `from_str_radix` takes a sign.
        let number = |part: &str| {
            let digits = (1..=8).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_hexdigit());
            if digits { u32::from_str_radix(part, 16).map_err(drop) } else { Err(()) }
        };
        let parts = text.split([':', '.']).map(number).collect::<Result<Vec<u32>, ()>>()?;
        let (domain, bus, device, function) = match parts[..] {
            [domain, bus, device, function] => (domain, bus, device, function),
            // With colons alone SPDK takes three numbers for a domain, a bus and a device.
            [bus, device, function] if text.contains('.') => (0, bus, device, function),
            _ => return Err(()),
        };
        let byte = |value: u32, max: u8| u8::try_from(value).ok().filter(|&value| value <= max).ok_or(());
        Ok(Bdf { domain, bus: byte(bus, 0xff)?, device: byte(device, 0x1f)?, function: byte(function, 7)? })
    }
}

/// Where to look, and for whom.
#[derive(Debug, Clone)]
pub(super) struct System {
    /// `/`; in tests a directory with `sys`, `dev`, `proc` and `tmp` in it.
    root: PathBuf,
    uid: u32,
    /// How much memory the user may lock, if that is limited.
    memlock: Option<u64>,
    /// Whether the user may read and write a file that exists.
    may_use: fn(&Path) -> bool,
}

impl System {
    /// This machine and the user that this process runs as.
    pub(super) fn this() -> System {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: `limit` is a structure of the type asked for, and lives over the call.
        let known = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) } == 0;
        System {
            root: PathBuf::from("/"),
            // SAFETY: only reads the process's user id.
            uid: unsafe { libc::geteuid() },
            memlock: (known && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur),
            may_use,
        }
    }

    fn path(&self, absolute: &str) -> PathBuf {
        self.root.join(absolute.trim_start_matches('/'))
    }

    fn device(&self, bdf: Bdf) -> PathBuf {
        self.path("/sys/bus/pci/devices").join(bdf.to_string())
    }

    /// The kernel driver of a device.
    fn driver(&self, bdf: Bdf) -> Option<String> {
        link_name(&self.device(bdf).join("driver"))
    }

    fn class(&self, bdf: Bdf) -> Option<u32> {
        let text = fs::read_to_string(self.device(bdf).join("class")).ok()?;
        u32::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
    }

    /// All NVMe controllers.
    fn controllers(&self) -> Vec<Bdf> {
        let mut found: Vec<Bdf> = names(&self.path("/sys/bus/pci/devices"))
            .iter()
            .filter_map(|name| name.parse().ok())
            .filter(|&bdf| self.class(bdf) == Some(NVME_CLASS))
            .collect();
        found.sort();
        found
    }

    /// Whether VFIO works without an IOMMU here, which root must have asked for.
    fn no_iommu_mode(&self) -> bool {
        let parameter = self.path("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode");
        fs::read_to_string(parameter).is_ok_and(|text| matches!(text.trim(), "Y" | "1"))
    }

    /// The block devices of a controller that the kernel drives, and what of them is mounted.
    fn in_use(&self, bdf: Bdf) -> (Vec<String>, Vec<String>) {
        let controllers = self.device(bdf).join("nvme");
        let mut disks: Vec<String> = names(&controllers)
            .iter()
            .flat_map(|controller| names(&controllers.join(controller)))
            .filter(|name| {
                name.strip_prefix("nvme").is_some_and(|rest| {
                    rest.contains('n') && rest.bytes().all(|b| b == b'n' || b.is_ascii_digit())
                })
            })
            .collect();
        disks.sort();
        let mounts = fs::read_to_string(self.path("/proc/mounts")).unwrap_or_default();
        let mounted = mounts
            .lines()
            .filter_map(|line| {
                let (source, rest) = line.split_once(' ')?;
                let name = source.strip_prefix("/dev/")?;
                let of = |disk: &String| {
                    name.strip_prefix(disk.as_str())
                        .is_some_and(|partition| partition.is_empty() || partition.starts_with('p'))
                };
                disks.iter().any(of).then(|| rest.split(' ').next().unwrap_or_default().to_owned())
            })
            .collect();
        (disks, mounted)
    }
}

/// What must be mended before SPDK can have a controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Obstacle {
    /// It is no PCI address.
    BadAddress {
        /// What was given.
        text: String,
    },
    /// This machine, container or jail shows no PCI devices.
    NoPci,
    /// There is nothing at the address.
    NoDevice {
        /// The address.
        bdf: Bdf,
        /// Where NVMe controllers are.
        controllers: Vec<Bdf>,
    },
    /// There is something else at the address.
    NotNvme {
        /// The address.
        bdf: Bdf,
        /// Its PCI class, if that can be read.
        class: Option<u32>,
        /// Where NVMe controllers are.
        controllers: Vec<Bdf>,
    },
    /// Its filesystem is in use through the kernel.
    Mounted {
        /// The address.
        bdf: Bdf,
        /// Where.
        mount_points: Vec<String>,
    },
    /// A kernel driver, or none, has it instead of one for user space.
    NotBound {
        /// The address.
        bdf: Bdf,
        /// Who has it.
        driver: Option<String>,
        /// The block devices that will disappear when it is handed over.
        disks: Vec<String>,
        /// The driver that it should be handed to.
        wanted: &'static str,
    },
    /// Other devices that cannot be told apart by the IOMMU belong to kernel drivers.
    GroupShared {
        /// The IOMMU group.
        group: String,
        /// The others, and who has them.
        others: Vec<(Bdf, String)>,
    },
    /// The device file that SPDK would open does not exist here.
    NoDeviceFile {
        /// The file.
        path: String,
    },
    /// The user may not open a device file.
    Denied {
        /// The file.
        path: String,
    },
    /// Only root may have devices of this driver.
    RootOnly {
        /// The address.
        bdf: Bdf,
        /// The driver.
        driver: String,
        /// Whether VFIO, which others may use, is possible on this machine.
        iommu: bool,
    },
    /// The user may not pin enough memory for DMA.
    LockedMemory {
        /// How many bytes.
        limit: u64,
    },
    /// Another user's process has it, or left its lock file behind.
    Claimed {
        /// The lock file.
        path: String,
    },
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Obstacle::BadAddress { text } => {
                write!(f, "'{text}' is no PCI address; give one like 0000:00:04.0 (`lspci -D` lists them)")
            }
            Obstacle::NoPci => write!(
                f,
                "there is no /sys/bus/pci: in a container, give it the host's /sys (`docker run --privileged -v \
                 /sys:/sys`)"
            ),
            Obstacle::NoDevice { bdf, controllers } => {
                write!(f, "there is no PCI device {bdf}; {}", Controllers(controllers))
            }
            Obstacle::NotNvme { bdf, class, controllers } => {
                write!(f, "PCI device {bdf} is no NVMe controller")?;
                if let Some(class) = class {
                    write!(f, " (its class is {class:06x})")?;
                }
                write!(f, "; {}", Controllers(controllers))
            }
            Obstacle::Mounted { bdf, mount_points } => write!(
                f,
                "NVMe controller {bdf} holds filesystems that the kernel has mounted ({}); they would be torn away. \
                 Unmount them first: `sudo umount {}`",
                mount_points.join(", "),
                mount_points.join(" ")
            ),
            Obstacle::NotBound { bdf, driver, disks, wanted } => {
                match driver {
                    Some(driver) => {
                        write!(f, "NVMe controller {bdf} belongs to the kernel's driver {driver}")?
                    }
                    None => write!(f, "NVMe controller {bdf} has no driver")?,
                }
                if !disks.is_empty() {
                    write!(f, " (as {}, which will disappear; what is on it stays)", disks.join(", "))?;
                }
                write!(f, "; hand it to {wanted}: {}", Bind { bdf: *bdf, wanted, bound: driver.is_some() })
            }
            Obstacle::GroupShared { group, others } => {
                write!(f, "its IOMMU group {group} has devices that belong to kernel drivers (")?;
                for (number, (bdf, driver)) in others.iter().enumerate() {
                    write!(f, "{}{bdf}: {driver}", if number == 0 { "" } else { ", " })?;
                }
                write!(f, "), and a group can only be used as a whole; hand them over, too")?;
                for (bdf, _) in others {
                    write!(f, ", {}", Bind { bdf: *bdf, wanted: "vfio-pci", bound: true })?;
                }
                Ok(())
            }
            Obstacle::NoDeviceFile { path } => write!(
                f,
                "there is no {path}; load the driver: `sudo modprobe vfio-pci`, or, in a container, give it the device: \
                 `docker run --device {path}`"
            ),
            Obstacle::Denied { path } => write!(
                f,
                "permission denied for {path}; give it to your user: `sudo chown $USER {path}` (until the next boot; an \
                 udev rule makes it last)"
            ),
            Obstacle::RootOnly { bdf, driver, iommu: true } => write!(
                f,
                "NVMe controller {bdf} belongs to {driver}, which only root can use; use vfio-pci instead: {}",
                Bind { bdf: *bdf, wanted: "vfio-pci", bound: true }
            ),
            Obstacle::RootOnly { bdf, driver, iommu: false } => write!(
                f,
                "NVMe controller {bdf} belongs to {driver}, which only root can use: run this program with sudo. (Others \
                 could with vfio-pci, which needs an IOMMU: turn on VT-d or AMD-Vi in the firmware, and boot with \
                 intel_iommu=on on Intel processors)"
            ),
            Obstacle::LockedMemory { limit } => write!(
                f,
                "your user may lock {} MiB of memory, and DMA needs {} MiB and more: `sudo prlimit --memlock=unlimited \
                 --pid $$` for this shell, or `echo \"$USER - memlock unlimited\" | sudo tee \
                 /etc/security/limits.d/90-spdk.conf` and log in again",
                limit >> 20,
                PINNED_BYTES_NEEDED >> 20
            ),
            Obstacle::Claimed { path } => write!(
                f,
                "another user's program has it, or was killed while it had it: {path} is not yours; if no such program \
                 runs, `sudo rm {path}`"
            ),
        }
    }
}

/// Where NVMe controllers are, in words.
struct Controllers<'a>(&'a [Bdf]);

impl fmt::Display for Controllers<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((first, rest)) = self.0.split_first() else {
            return write!(f, "this machine shows no NVMe controller at all (`lspci -D -d ::0108`)");
        };
        write!(f, "NVMe controllers are at {first}")?;
        rest.iter().try_for_each(|bdf| write!(f, ", {bdf}"))
    }
}

/// The command that hands a device to a driver: once with a tool, once without.
struct Bind<'a> {
    bdf: Bdf,
    wanted: &'a str,
    bound: bool,
}

impl fmt::Display for Bind<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Bind { bdf, wanted, bound } = self;
        let sys = "/sys/bus/pci";
        write!(
            f,
            "`sudo modprobe {wanted} && sudo driverctl --nosave set-override {bdf} {wanted}` (package driverctl; \
             SPDK's scripts/setup.sh does it for all controllers), or without it, as root: `modprobe {wanted}; echo \
             {wanted} > {sys}/devices/{bdf}/driver_override; "
        )?;
        if *bound {
            write!(f, "echo {bdf} > {sys}/devices/{bdf}/driver/unbind; ")?;
        }
        write!(f, "echo {bdf} > {sys}/drivers_probe`")
    }
}

/// What stands between this process and the NVMe controller at a PCI address, in words with the command that mends it.
pub(super) fn pcie(bdf: &str) -> Option<String> {
    obstacle(&System::this(), bdf).map(|obstacle| obstacle.to_string())
}

/// As [`pcie`], for any system.
pub(super) fn obstacle(system: &System, bdf: &str) -> Option<Obstacle> {
    let Ok(bdf) = bdf.parse::<Bdf>() else { return Some(Obstacle::BadAddress { text: bdf.to_owned() }) };
    if !system.path("/sys/bus/pci/devices").is_dir() {
        return Some(Obstacle::NoPci);
    }
    if !system.device(bdf).is_dir() {
        return Some(Obstacle::NoDevice { bdf, controllers: system.controllers() });
    }
    let class = system.class(bdf);
    if class != Some(NVME_CLASS) {
        return Some(Obstacle::NotNvme { bdf, class, controllers: system.controllers() });
    }
    let group = link_name(&system.device(bdf).join("iommu_group"));
    let driver = system.driver(bdf);
    let obstacle = match driver.as_deref() {
        Some("vfio-pci") => vfio(system, bdf, group.as_deref()),
        Some(driver @ ("uio_pci_generic" | "igb_uio")) => (system.uid != 0)
            .then(|| Obstacle::RootOnly { bdf, driver: driver.to_owned(), iommu: group.is_some() })
            .or_else(|| uio(system, bdf)),
        _ => {
            let (disks, mount_points) = system.in_use(bdf);
            if !mount_points.is_empty() {
                return Some(Obstacle::Mounted { bdf, mount_points });
            }
            let vfio = group.is_some() || system.no_iommu_mode();
            let wanted = if vfio { "vfio-pci" } else { "uio_pci_generic" };
            return Some(Obstacle::NotBound { bdf, driver, disks, wanted });
        }
    };
    obstacle.or_else(|| claimed(system, bdf))
}

/// The device is VFIO's: its group must be, too, and the user must be allowed to have it.
fn vfio(system: &System, bdf: Bdf, group: Option<&str>) -> Option<Obstacle> {
    // Without an IOMMU the kernel makes a group up, whose file has a name of its own.
    let file = match group {
        Some(group) if system.no_iommu_mode() && !system.path(&format!("/dev/vfio/{group}")).exists() => {
            format!("/dev/vfio/noiommu-{group}")
        }
        Some(group) => format!("/dev/vfio/{group}"),
        None => "/dev/vfio/vfio".to_owned(),
    };
    if let Some(group) = group {
        let members = names(&system.device(bdf).join("iommu_group/devices"));
        let mut others: Vec<(Bdf, String)> = members
            .iter()
            .filter_map(|name| name.parse().ok())
            .filter_map(|other| Some((other, system.driver(other)?)))
            // Bridges have drivers that do no DMA of their own.
            .filter(|(_, driver)| !matches!(driver.as_str(), "vfio-pci" | "pci-stub" | "pcieport"))
            .collect();
        others.sort();
        if !others.is_empty() {
            return Some(Obstacle::GroupShared { group: group.to_owned(), others });
        }
    }
    let unusable = ["/dev/vfio/vfio".to_owned(), file].into_iter().find_map(|path| device_file(system, path));
    unusable.or_else(|| {
        let limit = system.memlock.filter(|&limit| system.uid != 0 && limit < PINNED_BYTES_NEEDED)?;
        Some(Obstacle::LockedMemory { limit })
    })
}

fn uio(system: &System, bdf: Bdf) -> Option<Obstacle> {
    let uio = names(&system.device(bdf).join("uio")).into_iter().next()?;
    device_file(system, format!("/dev/{uio}"))
}

fn device_file(system: &System, path: String) -> Option<Obstacle> {
    let here = system.path(&path);
    if !here.exists() {
        return Some(Obstacle::NoDeviceFile { path });
    }
    (!(system.may_use)(&here)).then_some(Obstacle::Denied { path })
}

/// SPDK locks a file for each controller that it has (in 20.07 in /tmp, later in /var/tmp). One that belongs to somebody
/// else cannot be opened, not even by root (the kernel's `fs.protected_regular`). Who has it at the moment, SPDK says.
fn claimed(system: &System, bdf: Bdf) -> Option<Obstacle> {
    ["/tmp", "/var/tmp"].iter().find_map(|directory| {
        let path = format!("{directory}/spdk_pci_lock_{bdf}");
        let file = fs::symlink_metadata(system.path(&path)).ok()?;
        (file.uid() != system.uid).then_some(Obstacle::Claimed { path })
    })
}

/// The last part of where a symbolic link leads.
fn link_name(link: &Path) -> Option<String> {
    Some(fs::read_link(link).ok()?.file_name()?.to_string_lossy().into_owned())
}

/// The names in a directory; none if it cannot be read.
fn names(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned())).collect();
    names.sort();
    names
}

/// Whether this process may read and write a file. (Opening a VFIO group would take it.)
fn may_use(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    // SAFETY: `path` is a terminated string that lives over the call.
    unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), libc::R_OK | libc::W_OK, libc::AT_EACCESS) == 0 }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    /// A machine in a directory.
    struct Machine {
        root: TempDir,
        system: System,
    }

    const ADDRESS: &str = "0000:00:04.0";

    impl Machine {
        /// With PCI, a user who may do everything with device files, and no device.
        fn new(uid: u32) -> Machine {
            let root = tempfile::tempdir().unwrap();
            for directory in
                ["sys/bus/pci/devices", "sys/kernel/iommu_groups", "dev/vfio", "proc", "tmp", "var/tmp"]
            {
                fs::create_dir_all(root.path().join(directory)).unwrap();
            }
            let system = System { root: root.path().to_owned(), uid, memlock: None, may_use: |_| true };
            Machine { root, system }
        }

        fn file(&self, path: &str, content: &str) {
            let path = self.root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }

        fn directory(&self, path: &str) {
            fs::create_dir_all(self.root.path().join(path)).unwrap();
        }

        /// `sys/bus/pci/devices/BDF`, a link to where the kernel keeps the device.
        fn device(&self, bdf: &str, class: &str, driver: Option<&str>, group: Option<&str>) {
            let home = format!("sys/devices/pci0000:00/{bdf}");
            self.file(&format!("{home}/class"), &format!("{class}\n"));
            let at = |path: &str| self.root.path().join(path);
            symlink(format!("../../../devices/pci0000:00/{bdf}"), at(&format!("sys/bus/pci/devices/{bdf}")))
                .unwrap();
            if let Some(driver) = driver {
                self.directory(&format!("sys/bus/pci/drivers/{driver}"));
                let target = format!("../../../bus/pci/drivers/{driver}");
                symlink(target, at(&format!("{home}/driver"))).unwrap();
            }
            if let Some(group) = group {
                let members = format!("sys/kernel/iommu_groups/{group}/devices");
                self.directory(&members);
                symlink(format!("../../../kernel/iommu_groups/{group}"), at(&format!("{home}/iommu_group")))
                    .unwrap();
                let target = format!("../../../../devices/pci0000:00/{bdf}");
                symlink(target, at(&format!("{members}/{bdf}"))).unwrap();
            }
        }

        fn nvme(&self, driver: Option<&str>, group: Option<&str>) {
            self.device(ADDRESS, "0x010802", driver, group);
        }

        fn obstacle(&self) -> Option<Obstacle> {
            obstacle(&self.system, ADDRESS)
        }

        /// The message, which must have all of these in it.
        fn says(&self, parts: &[&str]) {
            let message = self.obstacle().expect("an obstacle").to_string();
            for part in parts {
                assert!(message.contains(part), "no {part:?} in: {message}");
            }
        }
    }

    fn bdf(text: &str) -> Bdf {
        text.parse().unwrap()
    }

    #[test]
    fn addresses() {
        for (text, proper) in [
            ("0000:00:04.0", "0000:00:04.0"),
            ("0000.00.04.0", "0000:00:04.0"),
            ("5e:00.1", "0000:5e:00.1"),
            ("10000:E1:1f.7", "10000:e1:1f.7"),
        ] {
            assert_eq!(bdf(text).to_string(), proper);
        }
        for text in [
            "",
            ":",
            "...",
            "04",
            "00:04",
            "0000:00:04",
            "0000:00:20.0",
            "0000:100:04.0",
            "0000:00:04.8",
            "0:0:0:0:0",
            "+1:00:04.0",
            "0000:00:04.-1",
            "0000:00: 4.0",
            "123456789:00:04.0",
            "nvme0",
            "/dev/nvme0n1",
            "0000:00:04.é",
        ] {
            assert_eq!(text.parse::<Bdf>(), Err(()), "{text}");
            let expected = Obstacle::BadAddress { text: text.to_owned() };
            assert_eq!(obstacle(&Machine::new(0).system, text), Some(expected), "{text}");
        }
    }

    #[test]
    fn no_pci_at_all() {
        let machine = Machine::new(0);
        fs::remove_dir_all(machine.root.path().join("sys/bus")).unwrap();
        assert_eq!(machine.obstacle(), Some(Obstacle::NoPci));
        machine.says(&["/sys/bus/pci", "container"]);
    }

    #[test]
    fn nothing_or_something_else_there() {
        let machine = Machine::new(0);
        machine.says(&["no PCI device 0000:00:04.0", "no NVMe controller at all"]);
        machine.device("0000:00:05.0", "0x010802", Some("nvme"), None);
        machine.device("0000:5e:00.0", "0x010802", Some("nvme"), None);
        machine.says(&["no PCI device 0000:00:04.0", "at 0000:00:05.0, 0000:5e:00.0"]);
        machine.device(ADDRESS, "0x020000", Some("virtio-pci"), None);
        machine.says(&["is no NVMe controller", "class is 020000", "at 0000:00:05.0, 0000:5e:00.0"]);
        // An unreadable class.
        machine.file("sys/devices/pci0000:00/0000:00:04.0/class", "garbage");
        let controllers = vec![bdf("0000:00:05.0"), bdf("0000:5e:00.0")];
        assert_eq!(
            machine.obstacle(),
            Some(Obstacle::NotNvme { bdf: bdf(ADDRESS), class: None, controllers })
        );
    }

    #[test]
    fn still_with_the_kernel() {
        let machine = Machine::new(1000);
        machine.nvme(Some("nvme"), Some("7"));
        for file in [
            "nvme/nvme0/nvme0n1/size",
            "nvme/nvme0/nvme0n2/size",
            "nvme/nvme0/hwmon1/name",
            "nvme/nvme0/address",
        ] {
            machine.file(&format!("sys/devices/pci0000:00/{ADDRESS}/{file}"), "1");
        }
        machine.file("proc/mounts", "/dev/vda1 / ext4 rw 0 0\n/dev/nvme0n11 /other ext4 rw 0 0\nbroken\n");
        machine.says(&[
            "belongs to the kernel's driver nvme (as nvme0n1, nvme0n2,",
            "driverctl --nosave set-override 0000:00:04.0 vfio-pci",
            "echo vfio-pci > /sys/bus/pci/devices/0000:00:04.0/driver_override",
            "echo 0000:00:04.0 > /sys/bus/pci/devices/0000:00:04.0/driver/unbind",
            "setup.sh",
        ]);
        machine.file("proc/mounts", "/dev/nvme0n1p2 /home ext4 rw 0 0\n/dev/nvme0n2 /srv xfs rw 0 0\n");
        machine.says(&["(/home, /srv)", "sudo umount /home /srv"]);
    }

    #[test]
    fn without_an_iommu_it_is_uio() {
        let machine = Machine::new(0);
        machine.nvme(None, None);
        machine.says(&["has no driver", "set-override 0000:00:04.0 uio_pci_generic"]);
        assert!(!machine.obstacle().unwrap().to_string().contains("unbind"), "there is nothing to unbind");
        // Unless VFIO may do without.
        machine.file("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n");
        machine.says(&["set-override 0000:00:04.0 vfio-pci"]);
    }

    #[test]
    fn uio_is_for_root() {
        for (group, part) in [(None, "intel_iommu=on"), (Some("7"), "set-override 0000:00:04.0 vfio-pci")] {
            let machine = Machine::new(1000);
            machine.nvme(Some("uio_pci_generic"), group);
            machine.says(&["only root can use", part]);
        }
        let machine = Machine::new(0);
        machine.nvme(Some("uio_pci_generic"), None);
        machine.file(&format!("sys/devices/pci0000:00/{ADDRESS}/uio/uio3/name"), "");
        machine.says(&["no /dev/uio3"]);
        machine.file("dev/uio3", "");
        assert_eq!(machine.obstacle(), None);
    }

    #[test]
    fn vfio_files_and_permissions() {
        let mut machine = Machine::new(1000);
        machine.nvme(Some("vfio-pci"), Some("7"));
        machine.says(&["no /dev/vfio/vfio", "modprobe vfio-pci"]);
        machine.file("dev/vfio/vfio", "");
        machine.says(&["no /dev/vfio/7"]);
        machine.file("dev/vfio/7", "");
        assert_eq!(machine.obstacle(), None);
        machine.system.may_use = |path| !path.ends_with("vfio/7");
        machine.says(&["permission denied for /dev/vfio/7", "sudo chown $USER /dev/vfio/7"]);
        machine.system.may_use = |_| true;
        machine.system.memlock = Some(8 << 20);
        machine.says(&["may lock 8 MiB", "memlock unlimited"]);
        machine.system.memlock = Some(4 << 30);
        assert_eq!(machine.obstacle(), None);
        (machine.system.uid, machine.system.memlock) = (0, Some(8 << 20));
        assert_eq!(machine.obstacle(), None, "root's locked memory is not limited");
    }

    #[test]
    fn vfio_without_an_iommu() {
        let machine = Machine::new(0);
        machine.nvme(Some("vfio-pci"), Some("0"));
        machine.file("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n");
        machine.file("dev/vfio/vfio", "");
        machine.says(&["no /dev/vfio/noiommu-0"]);
        machine.file("dev/vfio/noiommu-0", "");
        assert_eq!(machine.obstacle(), None);
    }

    #[test]
    fn a_group_is_had_as_a_whole() {
        let machine = Machine::new(0);
        machine.nvme(Some("vfio-pci"), Some("7"));
        machine.device("0000:00:01.0", "0x060400", Some("pcieport"), Some("7"));
        machine.device("0000:00:06.0", "0x020000", None, Some("7"));
        machine.file("dev/vfio/vfio", "");
        machine.file("dev/vfio/7", "");
        assert_eq!(machine.obstacle(), None);
        machine.device("0000:00:05.0", "0x020000", Some("e1000e"), Some("7"));
        machine.says(&["group 7", "(0000:00:05.0: e1000e)", "set-override 0000:00:05.0 vfio-pci"]);
    }

    #[test]
    fn the_lock_file_of_another_user() {
        let mut machine = Machine::new(1000);
        machine.nvme(Some("vfio-pci"), Some("7"));
        machine.file("dev/vfio/vfio", "");
        machine.file("dev/vfio/7", "");
        machine.file("var/tmp/spdk_pci_lock_0000:00:04.0", "");
        let owner =
            fs::metadata(machine.root.path().join("var/tmp/spdk_pci_lock_0000:00:04.0")).unwrap().uid();
        machine.system.uid = owner;
        assert_eq!(machine.obstacle(), None);
        machine.system.uid = owner + 1;
        machine.says(&["sudo rm /var/tmp/spdk_pci_lock_0000:00:04.0"]);
    }

    #[test]
    fn this_machine() {
        // Whatever it has; nothing may panic.
        assert!(pcie("ffff:ff:1f.7").is_some());
        assert!(pcie("no address").is_some_and(|message| message.contains("no PCI address")));
        for controller in System::this().controllers() {
            println!("{controller}: {:?}", pcie(&controller.to_string()));
        }
        assert!(may_use(Path::new("/dev/null")));
        assert!(!may_use(Path::new("/does/not/exist")));
    }
}
