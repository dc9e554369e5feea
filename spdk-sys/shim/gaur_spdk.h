/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * The C side of spdk-sys: everything that differs between SPDK versions, or that is a C struct or macro rather than a
 * function, so that Rust sees one interface from SPDK 20.07 on.
 *
 * It is compiled against the installed headers. build.rs looks for features in those headers and passes what it finds
 * as GAUR_HAVE_* macros; version numbers are not compared (development snapshots carry the number of the next release).
 *
 * Who may call what: functions that take or use "the current SPDK thread" need spdk_set_thread() before them, and all
 * of the subsystem, configuration and open/close functions must run on one and the same SPDK thread (the first one
 * created, which newer SPDK calls the app thread). Nothing here locks; nothing here blocks, except
 * gaur_thread_destroy().
 *
 * Not here: the per-I/O calls. Those are plain SPDK functions that have not changed since 20.07, and Rust calls them
 * directly.
 */
#ifndef GAUR_SPDK_H
#define GAUR_SPDK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct spdk_bdev;
struct spdk_bdev_desc;
struct spdk_bdev_io;
struct spdk_io_channel;
struct spdk_thread;

/* Counts incompatible changes of this header. Rust compares it with what the compiled shim reports. */
#define GAUR_SPDK_API 3

/* Length of the message buffers that the functions below fill, terminator included. */
#define GAUR_SPDK_MESSAGE 512

/* ---- versions and layouts ---------------------------------------------------------------------------------------- */

uint32_t gaur_spdk_api(void);
/* "SPDK v20.07" */
const char *gaur_spdk_version(void);
/* major * 10000 + minor * 100 + patch */
uint32_t gaur_spdk_version_number(void);

/* What the C compiler thinks of the types that Rust and C both touch. */
struct gaur_layout {
	uint64_t iovec_size;
	uint64_t iovec_base_offset;
	uint64_t iovec_len_offset;
	uint64_t env_opts_size;
	uint64_t bdev_info_size;
	uint64_t io_error_size;
	uint64_t config_entry_size;
	uint64_t bool_size;
	uint64_t size_t_size;
	/* sizeof(struct spdk_env_opts), which Rust never sees; for information. */
	uint64_t spdk_env_opts_size;
};
void gaur_get_layout(struct gaur_layout *out);

/* ---- environment ------------------------------------------------------------------------------------------------- */

struct gaur_env_opts {
	/* Program name for DPDK's messages; not NULL. */
	const char *name;
	/* The CPU that DPDK takes for its main core. */
	uint32_t core;
	/* Memory to reserve at once in MiB, or -1 to take huge pages as they are needed. */
	int32_t mem_mib;
	/* Do not look for PCI devices. */
	bool no_pci;
	/* Use virtual addresses for DMA (needs no root, and no NVMe over PCIe without an IOMMU). */
	bool iova_va;
	/* Ordinary memory instead of huge pages: mem_mib of it, all at once (so mem_mib must be positive). Devices cannot
	 * do DMA to it in all versions, so PCI is left alone; NVMe/TCP, malloc, aio and uring bdevs work. */
	bool no_huge;
};

/* Initialises DPDK and SPDK's thread library, once in a process. The calling thread keeps its CPU affinity (DPDK pins
 * it; this puts it back). Returns 0 or a negative errno. */
int gaur_env_init(const struct gaur_env_opts *opts);

/* Levels of the log: SPDK's, and one for what DPDK says (which does not tell its level). */
#define GAUR_LOG_ERROR 0
#define GAUR_LOG_WARN 1
#define GAUR_LOG_NOTICE 2
#define GAUR_LOG_INFO 3
#define GAUR_LOG_DEBUG 4
#define GAUR_LOG_DPDK 100
/* text has no newline at its end. May be called by any thread. */
typedef void (*gaur_log_fn)(int level, const char *file, int line, const char *text);
/* Sends SPDK's log, and DPDK's, to fn instead of standard error. Before gaur_env_init(). */
void gaur_log_open(gaur_log_fn fn);

/* ---- threads ----------------------------------------------------------------------------------------------------- */

/* Polls with the time of the last poll as "now", as SPDK's own reactors do: one clock read less. */
int gaur_thread_poll(struct spdk_thread *thread);

/* Lets a thread handle all its messages, ends it and frees it. Its channels must have been put before. Waits for
 * messages up to timeout_ms; returns false (and leaks the thread) if it did not come to rest. Any OS thread may call
 * it, if no other uses the SPDK thread. */
bool gaur_thread_destroy(struct spdk_thread *thread, uint32_t timeout_ms);

/* ---- subsystems and configuration -------------------------------------------------------------------------------- */

/* Result of something that finishes while the thread is polled. */
struct gaur_wait {
	bool done;
	int rc;
};

/* Before the subsystems are initialised SPDK accepts "startup" RPC methods, afterwards "runtime" ones. */
void gaur_rpc_set_runtime(bool runtime);
/* Whether method may be called now: 0, -EPERM (only in the other phase), -ENOENT (unknown). */
int gaur_rpc_method_allowed(const char *method);

/* Initialises all linked subsystems. wait must live until done. */
void gaur_subsystems_init(struct gaur_wait *wait);
/* Waits until every bdev has been examined by the modules that build on others (does nothing before SPDK 20.10). */
void gaur_bdev_wait_for_examine(struct gaur_wait *wait);

/* A parsed JSON configuration: the RPC calls in it, in order. */
struct gaur_config;
struct gaur_config_entry {
	const char *subsystem;
	const char *method;
	/* A JSON object, or NULL. Not terminated. */
	const char *params;
	size_t params_len;
};
/* Copies text. Returns NULL and a message when it is no SPDK configuration. */
struct gaur_config *gaur_config_parse(const char *text, size_t len, char message[GAUR_SPDK_MESSAGE]);
size_t gaur_config_count(const struct gaur_config *config);
/* Entry i < count; valid as long as the configuration. */
const struct gaur_config_entry *gaur_config_get(const struct gaur_config *config, size_t i);
void gaur_config_free(struct gaur_config *config);

/* A JSON-RPC server of SPDK's and one client of it, both here in the process: SPDK has no other way to call an RPC
 * method by name. Opened once and kept for the life of the process (SPDK frees the server under requests that are still
 * being served). The files at socket_path and socket_path.lock may be deleted when gaur_rpc_open() has returned. */
struct gaur_rpc;
struct gaur_rpc *gaur_rpc_open(const char *socket_path, char message[GAUR_SPDK_MESSAGE]);
/* Starts a call. params may be NULL. Returns its id (> 0) or a negative errno. One call is waited for at a time; the
 * answer to a call that was given up is dropped when it comes. */
int32_t gaur_rpc_call(struct gaur_rpc *rpc, const char *method, const char *params, size_t params_len);
/* Moves the call on; the caller also polls the SPDK thread. Returns 0 while it runs, 1 when it succeeded, a negative
 * errno (with a message) when it failed. */
int gaur_rpc_poll(struct gaur_rpc *rpc, int32_t id, char message[GAUR_SPDK_MESSAGE]);

/* ---- block devices ----------------------------------------------------------------------------------------------- */

/* An open and (unless it was opened for reading) exclusively claimed bdev. */
struct gaur_bdev;

struct gaur_bdev_info {
	uint64_t num_blocks;
	uint32_t block_size;
	/* Alignment of buffers in bytes. */
	uint32_t buf_align;
	/* In blocks; 0: none. */
	uint32_t optimal_io_boundary;
	/* Writes must be multiples of this many blocks. */
	uint32_t write_unit;
	/* Bytes of metadata per block; 0: none. */
	uint32_t md_size;
	bool write_cache;
	bool can_write;
	bool can_flush;
	bool can_unmap;
	bool can_write_zeroes;
	bool zoned;
	/* It belongs to the NVMe driver: buffers must be SPDK's memory. */
	bool own_memory;
};

/* Opens by name. Returns 0, -ENODEV (no such bdev), -EBUSY (another module or opener has claimed it), or another
 * negative errno. Closing must happen on the same SPDK thread. */
int gaur_bdev_open(const char *name, bool write, struct gaur_bdev **out);
void gaur_bdev_close(struct gaur_bdev *bdev);
void gaur_bdev_get_info(const struct gaur_bdev *bdev, struct gaur_bdev_info *out);
/* Its proper name (it may have been opened by an alias). Valid as long as the bdev is open. */
const char *gaur_bdev_name(const struct gaur_bdev *bdev);
struct spdk_bdev_desc *gaur_bdev_desc(const struct gaur_bdev *bdev);
/* Non-zero once SPDK asked for the bdev back (hot removal, deletion). Written by the opening thread, to be read
 * atomically by any. Valid as long as the bdev is open. */
const uint32_t *gaur_bdev_removed(const struct gaur_bdev *bdev);

/* Whether SPDK's pool of I/Os can fill the cache of one more thread. Where it cannot, getting the thread's first channel
 * of a bdev crashes in SPDK. True as well when it cannot be found out. */
bool gaur_bdev_room_for_thread(void);

/* The names of all bdevs: calls fn for each. */
void gaur_bdev_names(void (*fn)(void *ctx, const char *name), void *ctx);

/* Makes the completed writes of the whole bdev durable: spdk_bdev_flush_blocks(), except on a bdev of the NVMe driver,
 * whose bdev module answers a flush without asking the drive in many versions (20.07 among them), and which gets an
 * NVMe flush command instead. Same rules and results as SPDK's own I/O calls. (A virtual bdev above an NVMe bdev is not
 * seen through: there a flush does what the module below makes of it.) */
int gaur_bdev_flush(const struct gaur_bdev *bdev, struct spdk_io_channel *channel,
		    void (*done)(struct spdk_bdev_io *io, bool success, void *arg), void *arg);

enum gaur_io_error_kind {
	GAUR_IO_FAILED = 0,
	GAUR_IO_NVME = 1,
	GAUR_IO_ERRNO = 2,
	GAUR_IO_NOMEM = 3,
	GAUR_IO_ABORTED = 4,
};

struct gaur_io_error {
	uint32_t kind;
	/* For GAUR_IO_ERRNO, positive. */
	int32_t error;
	uint8_t sct;
	uint8_t sc;
};
/* Why a completed bdev I/O failed. */
void gaur_bdev_io_error(struct spdk_bdev_io *io, struct gaur_io_error *out);

#endif
