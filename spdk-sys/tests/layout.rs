//! What Rust relies on in the compiled shim and the installed SPDK: versions, sizes, offsets, constants. Also, that a
//! program that depends on this crate links at all. Needs no huge pages and no root.

use std::ffi::CStr;
use std::mem::{MaybeUninit, offset_of, size_of};

use spdk_sys::{bdev, config, env, version};

#[test]
fn the_shim_is_the_one_these_bindings_were_made_from() {
    // SAFETY: takes nothing and returns a constant.
    let compiled = unsafe { version::gaur_spdk_api() };
    assert_eq!(compiled, version::GAUR_SPDK_API, "the shim was compiled from another gaur_spdk.h");
}

#[test]
fn spdk_says_the_version_of_its_headers() {
    // SAFETY: returns a string constant of the C program.
    let text = unsafe { CStr::from_ptr(version::gaur_spdk_version()) };
    let text = text.to_str().expect("the version is ASCII");
    let (major, minor) = (version::SPDK_VERSION_MAJOR, version::SPDK_VERSION_MINOR);
    assert!(text.starts_with(&format!("SPDK v{major:02}.{minor:02}")), "{text}");
    // SAFETY: takes nothing and returns a constant.
    let number = unsafe { version::gaur_spdk_version_number() };
    assert_eq!(number, major * 10_000 + minor * 100 + version::SPDK_VERSION_PATCH);
    assert!(number >= 20_07_00, "{text} is older than 20.07");
}

#[test]
fn both_compilers_agree_on_layouts() {
    let mut layout = MaybeUninit::<version::gaur_layout>::zeroed();
    // SAFETY: `layout` has the size of the C structure (bindgen's own checks), and the call fills all of it.
    let layout = unsafe {
        version::gaur_get_layout(layout.as_mut_ptr());
        layout.assume_init()
    };
    let check = |what: &str, c: u64, rust: usize| assert_eq!(c, rust as u64, "{what}");
    check("iovec", layout.iovec_size, size_of::<bdev::iovec>());
    check("iovec (libc)", layout.iovec_size, size_of::<libc::iovec>());
    check("iovec.iov_base", layout.iovec_base_offset, offset_of!(bdev::iovec, iov_base));
    check("iovec.iov_len", layout.iovec_len_offset, offset_of!(bdev::iovec, iov_len));
    check("iovec.iov_len (libc)", layout.iovec_len_offset, offset_of!(libc::iovec, iov_len));
    check("gaur_env_opts", layout.env_opts_size, size_of::<env::gaur_env_opts>());
    check("gaur_bdev_info", layout.bdev_info_size, size_of::<bdev::gaur_bdev_info>());
    check("gaur_io_error", layout.io_error_size, size_of::<bdev::gaur_io_error>());
    check("gaur_config_entry", layout.config_entry_size, size_of::<config::gaur_config_entry>());
    check("bool", layout.bool_size, size_of::<bool>());
    check("size_t", layout.size_t_size, size_of::<usize>());
    assert!(layout.spdk_env_opts_size > 0);
}

#[test]
fn constants_of_the_shim() {
    assert_eq!(bdev::io_error_kind::GAUR_IO_FAILED, 0);
    assert_eq!(bdev::io_error_kind::GAUR_IO_ABORTED, 4);
    const { assert!(config::GAUR_SPDK_MESSAGE >= 256) };
}

/// The configuration parser of the shim needs no environment; it is where outside data first meets C.
mod configuration {
    use super::*;

    fn parse(text: &str) -> Result<Vec<(String, String, Option<String>)>, String> {
        let mut message = [0; config::GAUR_SPDK_MESSAGE as usize];
        // SAFETY: `text` is `text.len()` readable bytes, which C copies; `message` has the length the header asks.
        let parsed =
            unsafe { config::gaur_config_parse(text.as_ptr().cast(), text.len(), message.as_mut_ptr()) };
        if parsed.is_null() {
            // SAFETY: on failure the shim has written a terminated message.
            let message = unsafe { CStr::from_ptr(message.as_ptr()) };
            return Err(message.to_string_lossy().into_owned());
        }
        // SAFETY: `parsed` is a live configuration.
        let count = unsafe { config::gaur_config_count(parsed) };
        let entries = (0..count).map(|i| {
            // SAFETY: `i < count`; the entry and its strings live until the configuration is freed below, and
            // `params` is `params_len` bytes of the copied text.
            unsafe {
                let entry = *config::gaur_config_get(parsed, i);
                let params = (!entry.params.is_null())
                    .then(|| std::slice::from_raw_parts(entry.params.cast::<u8>(), entry.params_len));
                (
                    CStr::from_ptr(entry.subsystem).to_string_lossy().into_owned(),
                    CStr::from_ptr(entry.method).to_string_lossy().into_owned(),
                    params.map(|bytes| String::from_utf8_lossy(bytes).into_owned()),
                )
            }
        });
        let entries = entries.collect();
        // SAFETY: nothing refers to it any more.
        unsafe { config::gaur_config_free(parsed) };
        Ok(entries)
    }

    #[test]
    fn calls_come_in_order_with_their_parameters() {
        let text = r#"{ "subsystems": [
            { "subsystem": "accel", "config": null },
            /* comments are allowed */
            { "subsystem": "bdev", "config": [
                { "method": "bdev_malloc_create", "params": { "name": "M", "list": [1, {"a": "}"}] } },
                { "method": "bdev_wait_for_examine" } ] } ] }"#;
        let entry =
            |method: &str, params: Option<&str>| ("bdev".into(), method.into(), params.map(str::to_owned));
        assert_eq!(
            parse(text),
            Ok(vec![
                entry("bdev_malloc_create", Some(r#"{ "name": "M", "list": [1, {"a": "}"}] }"#)),
                entry("bdev_wait_for_examine", None),
            ])
        );
    }

    #[test]
    fn what_is_no_configuration_is_refused_with_a_reason() {
        for (text, reason) in [
            ("", "not JSON"),
            ("[Malloc]\n  NumberOfLuns 1\n", "not JSON"),
            ("{\"subsystems\": [", "not JSON"),
            ("[]", "no \"subsystems\""),
            ("{}", "no \"subsystems\""),
            ("{\"subsystems\": 3}", "no \"subsystems\""),
            ("{\"subsystems\": [3]}", "no \"subsystem\" name"),
            ("{\"subsystems\": [{\"config\": []}]}", "no \"subsystem\" name"),
            ("{\"subsystems\": [{\"subsystem\": \"bdev\", \"config\": [{}]}]}", "no \"method\""),
            ("{\"subsystems\": [{\"subsystem\": \"bdev\", \"config\": [[]]}]}", "no \"method\""),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn no_truncation_of_a_good_configuration_crashes() {
        let text = r#"{"subsystems":[{"subsystem":"bdev","config":[{"method":"m","params":{"a":[1,2,{"b":"c"}]}}]}]}"#;
        for end in 0..text.len() {
            assert!(parse(&text[..end]).is_err(), "{}", &text[..end]);
        }
        assert!(parse(text).is_ok());
    }
}
