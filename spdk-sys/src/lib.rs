//! Bindings and a small C shim over the SPDK that is installed.
//!
//! Two things are here, and nothing else: SPDK functions that have been the same since 20.07 ([`mod@thread`], [`mod@bdev`],
//! [`mod@nvme`], [`mod@memory`]), bound directly by bindgen; and the shim (`shim/gaur_spdk.h`, `shim/gaur_nvme.h`, `shim/gaur_blobfs.h`: [`mod@env`], [`mod@config`], [`mod@blobfs`], part of the others),
//! which hides what differs between versions. Everything is raw: who may call what, and when, is said in the shim's
//! header and in SPDK's own documentation; the safe side is `bdev-adapter`.
//!
//! The generated bindings are private; the modules below say what is part of the interface. Only functions on the allow
//! list of `build.rs` exist.
//!
//! SPDK is found, compiled against and linked as `build.rs` says. There is one SPDK in a process, with one environment
//! ([`gaur_env_init`](env::gaur_env_init)).

mod bindings {
    #![allow(
        non_camel_case_types,
        non_upper_case_globals,
        non_snake_case,
        dead_code,
        missing_docs,
        unreachable_pub
    )]
    #![allow(unnecessary_transmutes, clippy::undocumented_unsafe_blocks, clippy::all)]
    include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
}

/// Versions, and what C thinks of the layouts that both sides touch.
pub mod version {
    pub use crate::bindings::{
        GAUR_SPDK_API, SPDK_VERSION_MAJOR, SPDK_VERSION_MINOR, SPDK_VERSION_PATCH, gaur_get_layout,
        gaur_layout, gaur_spdk_api, gaur_spdk_version, gaur_spdk_version_number,
    };
}

/// DPDK and SPDK's environment, its log.
pub mod env {
    pub use crate::bindings::{
        GAUR_LOG_DEBUG, GAUR_LOG_DPDK, GAUR_LOG_ERROR, GAUR_LOG_INFO, GAUR_LOG_NOTICE, GAUR_LOG_WARN,
        gaur_env_init, gaur_env_opts, gaur_log_fn, gaur_log_open,
    };
    pub use crate::bindings::{spdk_get_ticks, spdk_get_ticks_hz};
}

/// SPDK threads (cooperative contexts that any OS thread may poll, one at a time) and the channels they own.
pub mod thread {
    pub use crate::bindings::{
        gaur_thread_destroy, gaur_thread_poll, spdk_get_thread, spdk_io_channel, spdk_put_io_channel,
        spdk_set_thread, spdk_thread, spdk_thread_create, spdk_thread_is_idle, spdk_thread_poll,
    };
}

/// Subsystems, JSON configuration and RPC methods by name.
pub mod config {
    pub use crate::bindings::{
        GAUR_SPDK_MESSAGE, gaur_bdev_wait_for_examine, gaur_config, gaur_config_count, gaur_config_entry,
        gaur_config_free, gaur_config_get, gaur_config_parse, gaur_rpc, gaur_rpc_call,
        gaur_rpc_method_allowed, gaur_rpc_open, gaur_rpc_poll, gaur_rpc_set_runtime, gaur_subsystems_init,
        gaur_wait,
    };
}

/// Block devices: opening them, and the calls of the I/O path.
pub mod bdev {
    pub use crate::bindings::gaur_io_error_kind as io_error_kind;
    pub use crate::bindings::{
        gaur_bdev, gaur_bdev_close, gaur_bdev_desc, gaur_bdev_flush, gaur_bdev_get_info, gaur_bdev_info,
        gaur_bdev_io_error, gaur_bdev_name, gaur_bdev_names, gaur_bdev_open, gaur_bdev_removed,
        gaur_bdev_room_for_thread, gaur_io_error,
    };
    pub use crate::bindings::{
        iovec, spdk_bdev_desc, spdk_bdev_free_io, spdk_bdev_get_io_channel, spdk_bdev_io,
        spdk_bdev_read_blocks, spdk_bdev_readv_blocks, spdk_bdev_unmap_blocks, spdk_bdev_write_blocks,
        spdk_bdev_write_zeroes_blocks, spdk_bdev_writev_blocks,
    };
}

/// The NVMe driver: controllers, their queue pairs, and the calls of the I/O path.
pub mod nvme {
    pub use crate::bindings::{
        gaur_nvme_abort, gaur_nvme_alloc_qpair, gaur_nvme_attach, gaur_nvme_cover_registers,
        gaur_nvme_ctrlr_info, gaur_nvme_detach, gaur_nvme_get_ctrlr_info, gaur_nvme_get_ns_info,
        gaur_nvme_is_removed, gaur_nvme_keep_namespaces, gaur_nvme_ns_info, gaur_nvme_opts, gaur_nvme_reset,
        gaur_nvme_revoke_dma, gaur_nvme_status_offset, gaur_nvme_unmap,
    };
    pub use crate::bindings::{
        spdk_nvme_cpl, spdk_nvme_ctrlr, spdk_nvme_ctrlr_fail, spdk_nvme_ctrlr_free_io_qpair,
        spdk_nvme_ctrlr_get_first_active_ns, spdk_nvme_ctrlr_get_next_active_ns, spdk_nvme_ctrlr_get_ns,
        spdk_nvme_ctrlr_process_admin_completions, spdk_nvme_ctrlr_reconnect_io_qpair, spdk_nvme_ns,
        spdk_nvme_ns_cmd_flush, spdk_nvme_ns_cmd_read, spdk_nvme_ns_cmd_readv, spdk_nvme_ns_cmd_write,
        spdk_nvme_ns_cmd_write_zeroes, spdk_nvme_ns_cmd_writev, spdk_nvme_qpair,
        spdk_nvme_qpair_process_completions,
    };
}

/// BlobFS, to measure beside it.
pub mod blobfs {
    pub use crate::bindings::{
        gaur_blobfs, gaur_blobfs_append, gaur_blobfs_cache_thread, gaur_blobfs_close, gaur_blobfs_exists,
        gaur_blobfs_file, gaur_blobfs_init, gaur_blobfs_open, gaur_blobfs_read, gaur_blobfs_sync,
        gaur_blobfs_unload,
    };
}

/// Memory that devices may read and write.
pub mod memory {
    pub use crate::bindings::{spdk_dma_free, spdk_dma_malloc, spdk_dma_zmalloc};
}
