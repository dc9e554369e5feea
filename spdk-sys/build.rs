//! Finds the installed SPDK, compiles the C shim against its headers, generates the bindings, and says how to link.
//!
//! 1. [`locate`]: `SPDK_DIR` (an install prefix or a built source tree), else the prefix that `scripts/spdk.sh` installs
//!    to, else pkg-config.
//! 2. [`features`]: looks into the headers for what differs between versions, and tells the shim by macros.
//! 3. [`compile_shim`], [`generate_bindings`].
//! 4. [`link`]: SPDK and DPDK register bdev modules, transports, memory-pool handlers and RPC methods by constructors
//!    that nothing refers to, so their archives go in whole. `+whole-archive,-bundle` is recorded in this crate's
//!    metadata and takes effect when a program, test or example that depends on it is linked (plain link arguments would
//!    not travel that far).

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

/// SPDK libraries that are not linked.
///
/// The targets (NVMe-oF, iSCSI, vhost, ...) and their subsystems: nothing here serves blocks to others, and with the
/// subsystems linked and no SPDK reactors running, the initialisation of all subsystems never finishes. `ut_mock` is
/// for SPDK's unit tests.
const NOT_LINKED: &[&str] = &[
    "blobfs_bdev",
    "iscsi",
    "nbd",
    "nvmf",
    "scsi",
    "ublk",
    "ut",
    "ut_mock",
    "vfu_device",
    "vfu_tgt",
    "vfu_target",
    "vhost",
    "fsdev",
    "fsdev_aio",
    "fuse_dispatcher",
];

/// The subsystems (`spdk_event_NAME`) that bdevs need; all others are left out for the reason above.
const SUBSYSTEMS: &[&str] = &["accel", "bdev", "iobuf", "keyring", "net", "sock", "vmd"];

/// System libraries that SPDK 20.07 as built by `scripts/spdk.sh` needs. Later versions say theirs in
/// `spdk_syslibs.pc`.
const SYSTEM_LIBS: &[&str] = &["numa", "uuid", "crypto", "ssl", "rt", "dl", "pthread", "m", "aio"];

/// `(macro, header, text)`: the macro is defined for the shim when the header contains the text.
const FEATURES: &[(&str, &str, &str)] = &[
    ("GAUR_HAVE_INIT_H", "spdk/init.h", "spdk_subsystem_init("),
    ("GAUR_HAVE_RPC_SERVER", "spdk/rpc.h", "spdk_rpc_server_listen("),
    ("GAUR_HAVE_ENV_OPTS_SIZE", "spdk/env.h", "opts_size;"),
    ("GAUR_HAVE_NO_HUGE", "spdk/env.h", "no_huge;"),
    ("GAUR_HAVE_WAIT_FOR_EXAMINE", "spdk/bdev.h", "spdk_bdev_wait_for_examine("),
    ("GAUR_HAVE_BDEV_OPTS_SIZE", "spdk/bdev.h", "spdk_bdev_get_opts(struct spdk_bdev_opts *opts, size_t"),
    ("GAUR_HAVE_AIO_STATUS", "spdk/bdev.h", "spdk_bdev_io_get_aio_status("),
    ("GAUR_HAVE_BLOBFS", "spdk/blobfs.h", "spdk_file_read("),
    ("GAUR_HAVE_BS_DEV_EXT", "spdk/blob_bdev.h", "spdk_bdev_create_bs_dev_ext("),
    ("GAUR_HAVE_STATUS_ABORTED", "spdk/bdev_module.h", "SPDK_BDEV_IO_STATUS_ABORTED"),
];

/// The files of the C shim.
const SHIM: &[&str] = &[
    "shim/gaur_spdk.h",
    "shim/gaur_spdk.c",
    "shim/gaur_nvme.h",
    "shim/gaur_nvme.c",
    "shim/gaur_blobfs.h",
    "shim/gaur_blobfs.c",
];

/// What Rust may call. Everything else of SPDK stays out of the bindings.
const FUNCTIONS: &[&str] = &[
    "gaur_.*",
    "spdk_dma_zmalloc",
    "spdk_dma_malloc",
    "spdk_dma_free",
    "spdk_get_ticks",
    "spdk_get_ticks_hz",
    "spdk_thread_create",
    "spdk_thread_poll",
    "spdk_thread_is_idle",
    "spdk_set_thread",
    "spdk_get_thread",
    "spdk_put_io_channel",
    "spdk_bdev_get_io_channel",
    "spdk_bdev_read_blocks",
    "spdk_bdev_readv_blocks",
    "spdk_bdev_write_blocks",
    "spdk_bdev_writev_blocks",
    "spdk_bdev_unmap_blocks",
    "spdk_bdev_write_zeroes_blocks",
    "spdk_bdev_free_io",
    "spdk_nvme_ctrlr_get_ns",
    "spdk_nvme_ctrlr_get_first_active_ns",
    "spdk_nvme_ctrlr_get_next_active_ns",
    "spdk_nvme_ctrlr_process_admin_completions",
    "spdk_nvme_ctrlr_fail",
    "spdk_nvme_ctrlr_free_io_qpair",
    "spdk_nvme_ctrlr_reconnect_io_qpair",
    "spdk_nvme_qpair_process_completions",
    "spdk_nvme_ns_cmd_read",
    "spdk_nvme_ns_cmd_readv",
    "spdk_nvme_ns_cmd_write",
    "spdk_nvme_ns_cmd_writev",
    "spdk_nvme_ns_cmd_flush",
    "spdk_nvme_ns_cmd_write_zeroes",
];

fn main() {
    for name in ["SPDK_DIR", "XDG_CACHE_HOME", "HOME", "PKG_CONFIG_PATH", "SPDK_EXTRA_LIBS"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    for file in ["build.rs", "shim/wrapper.h"].iter().chain(SHIM) {
        println!("cargo::rerun-if-changed={file}");
    }
    let spdk = locate();
    // A new SPDK in the same place changes at least one of these.
    println!("cargo::rerun-if-changed={}", spdk.include.join("spdk").display());
    println!("cargo::rerun-if-changed={}", spdk.libs.display());
    println!("cargo::rerun-if-changed={}", spdk.dpdk.display());

    let features = features(&spdk.include);
    compile_shim(&spdk.include, &features);
    generate_bindings(&spdk.include);
    link(&spdk);
    println!("cargo::metadata=include={}", spdk.include.display());
}

/// Where things are.
struct Spdk {
    include: PathBuf,
    /// `libspdk_*.a`
    libs: PathBuf,
    /// `librte_*.a`
    dpdk: PathBuf,
    /// pkg-config files of this installation, if any.
    pkg_config: Option<PathBuf>,
}

/// Ends the build with a message that says what to do.
fn fail(message: &str) -> ! {
    for line in message.lines() {
        println!("cargo::error={line}");
    }
    exit(1);
}

fn locate() -> Spdk {
    if let Some(dir) = env::var_os("SPDK_DIR").filter(|dir| !dir.is_empty()) {
        let dir = PathBuf::from(dir);
        return in_directory(&dir).unwrap_or_else(|why| {
            fail(&format!(
                "SPDK_DIR={} is not an SPDK installation: {why}\n\
                 set it to an install prefix of SPDK 20.07 or later (with static libraries), or unset it and run \
                 `make spdk`",
                dir.display()
            ))
        });
    }
    let cached = cache_prefix();
    if let Some(prefix) = cached.as_deref().filter(|prefix| prefix.exists()) {
        return in_directory(prefix).unwrap_or_else(|why| {
            fail(&format!("the SPDK at {} is damaged: {why}\nrun `make spdk` again", prefix.display()))
        });
    }
    from_pkg_config().unwrap_or_else(|why| {
        fail(&format!(
            "SPDK was not found (SPDK_DIR is not set, {} does not exist, pkg-config: {why})\n\
             run `make spdk` (or `scripts/spdk.sh install`) to get and build it, or set SPDK_DIR to the prefix of your \
             own SPDK 20.07 or later",
            cached.map_or("the cache".into(), |p| p.display().to_string())
        ))
    })
}

/// The prefix of `scripts/spdk.sh`; keep in step with it.
fn cache_prefix() -> Option<PathBuf> {
    let cache = match env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(env::var_os("HOME")?).join(".cache"),
    };
    Some(cache.join("gaur").join("spdk-20.07"))
}

/// An install prefix, or a source tree in which SPDK was built.
fn in_directory(dir: &Path) -> Result<Spdk, String> {
    let include = dir.join("include");
    if !include.join("spdk/bdev.h").exists() {
        return Err("it has no include/spdk/bdev.h".into());
    }
    let libs = first_with(&[dir.join("lib"), dir.join("lib64"), dir.join("build/lib")], "libspdk_bdev.a")
        .ok_or("it has no lib/libspdk_bdev.a (static libraries are needed)")?;
    let dpdk = first_with(
        &[dir.join("dpdk/lib"), dir.join("dpdk/build/lib"), libs.clone(), dir.join("lib/dpdk")],
        "librte_eal.a",
    )
    .map_or_else(dpdk_from_pkg_config, Ok)?;
    let pkg_config = Some(libs.join("pkgconfig")).filter(|dir| dir.exists());
    Ok(Spdk { include, libs, dpdk, pkg_config })
}

fn first_with(dirs: &[PathBuf], file: &str) -> Option<PathBuf> {
    dirs.iter().find(|dir| dir.join(file).exists()).cloned()
}

fn from_pkg_config() -> Result<Spdk, String> {
    let libs = PathBuf::from(pkg_config(None, &["--variable=libdir", "spdk_bdev"])?);
    let include = PathBuf::from(pkg_config(None, &["--variable=includedir", "spdk_bdev"])?);
    if !libs.join("libspdk_bdev.a").exists() {
        return Err(format!("no libspdk_bdev.a in {} (static libraries are needed)", libs.display()));
    }
    let dpdk =
        first_with(std::slice::from_ref(&libs), "librte_eal.a").map_or_else(dpdk_from_pkg_config, Ok)?;
    let pkg_config = Some(libs.join("pkgconfig")).filter(|dir| dir.exists());
    Ok(Spdk { include, libs, dpdk, pkg_config })
}

fn dpdk_from_pkg_config() -> Result<PathBuf, String> {
    let dir = PathBuf::from(pkg_config(None, &["--variable=libdir", "libdpdk"])?);
    if dir.join("librte_eal.a").exists() {
        Ok(dir)
    } else {
        Err(format!("no librte_eal.a in {} (static libraries are needed)", dir.display()))
    }
}

/// Runs pkg-config, looking in `extra` first; its output, trimmed.
fn pkg_config(extra: Option<&Path>, args: &[&str]) -> Result<String, String> {
    let mut command = Command::new("pkg-config");
    if let Some(dir) = extra {
        let mut paths = vec![dir.to_owned()];
        paths.extend(env::var_os("PKG_CONFIG_PATH").iter().flat_map(env::split_paths));
        command.env("PKG_CONFIG_PATH", env::join_paths(paths).map_err(|e| e.to_string())?);
    }
    let output = command.args(args).output().map_err(|e| format!("cannot run pkg-config: {e}"))?;
    if !output.status.success() {
        return Err(format!("{} is not known to it", args.last().unwrap_or(&"")));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn features(include: &Path) -> Vec<&'static str> {
    FEATURES
        .iter()
        .filter(|(_, header, text)| {
            fs::read_to_string(include.join(header)).is_ok_and(|content| content.contains(text))
        })
        .map(|&(name, _, _)| name)
        .collect()
}

fn compile_shim(include: &Path, features: &[&str]) {
    let mut build = cc::Build::new();
    build.files(SHIM.iter().filter(|file| file.ends_with(".c")));
    build.include("shim").include(include).define("_GNU_SOURCE", None);
    for feature in features {
        build.define(feature, None);
    }
    // SPDK's own headers are not clean under -Wextra in all versions.
    build.flag_if_supported("-std=gnu11").warnings(true).extra_warnings(false);
    build.compile("gaur_spdk");
}

fn generate_bindings(include: &Path) {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("bindings.rs");
    let mut builder = bindgen::Builder::default()
        .header("shim/wrapper.h")
        .clang_arg(format!("-I{}", include.display()))
        .clang_args(["-Ishim", "-D_GNU_SOURCE"])
        .rust_edition(bindgen::RustEdition::Edition2024)
        .allowlist_type("gaur_.*")
        .allowlist_type("iovec")
        .allowlist_var("GAUR_.*")
        .allowlist_var("SPDK_VERSION_(MAJOR|MINOR|PATCH)")
        // Read at its place in the completion, which the specification fixes.
        .opaque_type("spdk_nvme_cpl")
        .default_enum_style(bindgen::EnumVariation::ModuleConsts)
        .layout_tests(true)
        .generate_comments(false);
    for function in FUNCTIONS {
        builder = builder.allowlist_function(function);
    }
    let bindings = builder.generate().unwrap_or_else(|error| {
        fail(&format!(
            "cannot generate bindings for the SPDK headers at {}: {error}\n\
             libclang is needed: on Debian, `apt-get install libclang-dev`",
            include.display()
        ))
    });
    if let Err(error) = bindings.write_to_file(&out) {
        fail(&format!("cannot write {}: {error}", out.display()));
    }
}

fn link(spdk: &Spdk) {
    println!("cargo::rustc-link-search=native={}", spdk.libs.display());
    println!("cargo::rustc-link-search=native={}", spdk.dpdk.display());
    let spdk_libs = archives(&spdk.libs, "spdk_");
    for name in spdk_libs.iter().filter(|name| is_linked(name)) {
        println!("cargo::rustc-link-lib=static:+whole-archive,-bundle=spdk_{name}");
    }
    for name in archives(&spdk.dpdk, "rte_") {
        println!("cargo::rustc-link-lib=static:+whole-archive,-bundle=rte_{name}");
    }
    // ISA-L, where SPDK was built with it.
    for name in ["isal", "isal_crypto"] {
        if spdk.libs.join(format!("lib{name}.a")).exists() {
            println!("cargo::rustc-link-lib=static:-bundle={name}");
        }
    }
    let mut system: Vec<String> = SYSTEM_LIBS.iter().map(|&name| name.to_owned()).collect();
    if spdk_libs.iter().any(|name| name.ends_with("_uring")) {
        system.push("uring".into());
    }
    // What the installation itself says it needs (SPDK 20.10 and later).
    if let Ok(flags) = pkg_config(spdk.pkg_config.as_deref(), &["--static", "--libs-only-l", "spdk_syslibs"])
    {
        let named = flags.split_whitespace().filter_map(|flag| flag.strip_prefix("-l"));
        system.extend(named.filter(|name| !name.starts_with("isal")).map(str::to_owned));
    }
    // What neither of us knows (an SPDK built with RDMA, for example): SPDK_EXTRA_LIBS="ibverbs rdmacm".
    let extra = env::var("SPDK_EXTRA_LIBS").unwrap_or_default();
    system.extend(extra.split_whitespace().map(str::to_owned));
    let mut seen = std::collections::HashSet::new();
    for name in system.iter().filter(|name| seen.insert(name.as_str())) {
        println!("cargo::rustc-link-lib=dylib={name}");
    }
}

fn is_linked(name: &str) -> bool {
    if let Some(subsystem) = name.strip_prefix("event_") {
        return SUBSYSTEMS.contains(&subsystem);
    }
    !NOT_LINKED.contains(&name) && !name.starts_with("vhost") && !name.starts_with("vfu")
}

/// The names of the static libraries `lib<prefix>NAME.a` in a directory, sorted.
fn archives(dir: &Path, prefix: &str) -> Vec<String> {
    let entries =
        fs::read_dir(dir).unwrap_or_else(|error| fail(&format!("cannot read {}: {error}", dir.display())));
    let mut names: Vec<String> = entries
        .filter_map(|entry| {
            let file = entry.ok()?.file_name().into_string().ok()?;
            let name = file.strip_prefix("lib")?.strip_prefix(prefix)?.strip_suffix(".a")?;
            Some(name.to_owned())
        })
        .collect();
    names.sort();
    names
}
