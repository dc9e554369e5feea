//! Safe handles on the shim's configuration parser and RPC client. Both belong to the helper thread of
//! [`env`](super::env); nothing here is `Send`.

use std::ffi::{CStr, CString, c_char};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use spdk_sys::config as sys;

/// One RPC call of a configuration.
#[derive(Debug, Clone)]
pub(super) struct Call {
    pub(super) subsystem: String,
    pub(super) method: CString,
    /// JSON text; empty for none.
    pub(super) params: String,
}

impl Call {
    pub(super) fn method(&self) -> &str {
        self.method.to_str().unwrap_or("?")
    }

    /// Whether SPDK takes the call now.
    pub(super) fn admission(&self) -> Admission {
        // SAFETY: `method` is a terminated string; the table of methods is filled by constructors and read only here,
        // on the helper thread.
        match unsafe { sys::gaur_rpc_method_allowed(self.method.as_ptr()) } {
            0 => Admission::Now,
            rc if rc == -libc::EPERM => Admission::OtherPhase,
            _ => Admission::Unknown,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    Now,
    /// Only before the subsystems are initialised, or only after it.
    OtherPhase,
    Unknown,
}

/// Tells SPDK which of the two kinds of methods it takes from now on.
pub(super) fn set_runtime(runtime: bool) {
    // SAFETY: sets a variable that only the helper thread uses.
    unsafe { sys::gaur_rpc_set_runtime(runtime) }
}

/// Buffer for a message of the shim.
struct Message([c_char; sys::GAUR_SPDK_MESSAGE as usize]);

impl Message {
    fn new() -> Message {
        Message([0; sys::GAUR_SPDK_MESSAGE as usize])
    }

    fn text(&self) -> String {
        let bytes: Vec<u8> = self.0.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// The calls of a JSON configuration in order.
///
/// # Errors
/// What is wrong with the text.
pub(super) fn parse(text: &[u8]) -> Result<Vec<Call>, String> {
    let mut message = Message::new();
    // SAFETY: `text` is readable for its length and copied by C; `message` has the length the shim's header asks for.
    let config = unsafe { sys::gaur_config_parse(text.as_ptr().cast(), text.len(), message.0.as_mut_ptr()) };
    let Some(config) = NonNull::new(config) else { return Err(message.text()) };
    // SAFETY: `config` is a configuration that was just made, freed once, below.
    let count = unsafe { sys::gaur_config_count(config.as_ptr()) };
    let call = |i| {
        // SAFETY: `i < count`, so the shim returns an entry that lives as long as `config`; its strings are terminated,
        // and `params` is null or `params_len` bytes of the configuration's text.
        let (subsystem, method, params) = unsafe {
            let entry = &*sys::gaur_config_get(config.as_ptr(), i);
            let params = match NonNull::new(entry.params.cast_mut().cast::<u8>()) {
                Some(params) => std::slice::from_raw_parts(params.as_ptr(), entry.params_len),
                None => &[],
            };
            (CStr::from_ptr(entry.subsystem), CStr::from_ptr(entry.method), params)
        };
        Call {
            subsystem: subsystem.to_string_lossy().into_owned(),
            method: method.to_owned(),
            params: String::from_utf8_lossy(params).into_owned(),
        }
    };
    let calls = (0..count).map(call).collect();
    // SAFETY: everything was copied out of it.
    unsafe { sys::gaur_config_free(config.as_ptr()) };
    Ok(calls)
}

/// SPDK's RPC server and a client of it, for the life of the process.
pub(super) struct Rpc(NonNull<sys::gaur_rpc>);

impl Rpc {
    /// Opens the connection, over a socket in a directory that only this user may enter and that is gone afterwards.
    /// Must be called on the helper thread, inside its SPDK thread, as all functions of this type.
    ///
    /// # Errors
    /// What the system or SPDK says.
    pub(super) fn open() -> Result<Rpc, String> {
        let directory = PrivateDir::new()?;
        let socket = directory.0.join("rpc");
        let path = CString::new(socket.as_os_str().as_bytes()).map_err(|_| "NUL in a path".to_owned())?;
        let mut message = Message::new();
        // SAFETY: `path` is terminated and copied, `message` is as long as asked.
        let rpc = unsafe { sys::gaur_rpc_open(path.as_ptr(), message.0.as_mut_ptr()) };
        NonNull::new(rpc).map(Rpc).ok_or_else(|| message.text())
    }

    /// Starts a call; its number, for [`poll`](Self::poll).
    ///
    /// # Errors
    /// The system's error.
    pub(super) fn start(&mut self, call: &Call) -> Result<i32, String> {
        let (params, len) = match call.params.as_str() {
            "" => (std::ptr::null(), 0),
            params => (params.as_ptr().cast(), params.len()),
        };
        // SAFETY: `self.0` is open; the strings are copied into the request.
        match unsafe { sys::gaur_rpc_call(self.0.as_ptr(), call.method.as_ptr(), params, len) } {
            id if id > 0 => Ok(id),
            rc => Err(std::io::Error::from_raw_os_error(-rc).to_string()),
        }
    }

    /// Moves call `id` on; its result once it has one.
    pub(super) fn poll(&mut self, id: i32) -> Option<Result<(), String>> {
        let mut message = Message::new();
        // SAFETY: `self.0` is open, `message` is as long as asked.
        match unsafe { sys::gaur_rpc_poll(self.0.as_ptr(), id, message.0.as_mut_ptr()) } {
            0 => None,
            1 => Some(Ok(())),
            _ => Some(Err(message.text())),
        }
    }
}

/// A directory for the socket; removed on drop with what SPDK has put there.
struct PrivateDir(PathBuf);

impl PrivateDir {
    fn new() -> Result<PrivateDir, String> {
        // A socket path has at most 107 bytes; a long TMPDIR is passed over.
        let base = Some(std::env::temp_dir()).filter(|dir| dir.as_os_str().len() < 64);
        let base = base.unwrap_or_else(|| PathBuf::from("/tmp"));
        let pid = std::process::id();
        let mut last = String::new();
        for attempt in 0..64 {
            let path = base.join(format!("gaur-spdk-{pid}-{attempt}"));
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(PrivateDir(path)),
                Err(error) => last = format!("cannot create {}: {error}", path.display()),
            }
        }
        Err(last)
    }
}

impl Drop for PrivateDir {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

fn remove(directory: &Path) {
    if let Err(error) = fs::remove_dir_all(directory) {
        log::warn!("cannot remove {}: {error}", directory.display());
    }
}
