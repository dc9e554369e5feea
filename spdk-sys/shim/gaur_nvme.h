/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * The part of the shim for SPDK's NVMe driver used directly, without the bdev layer; gaur_spdk.h says what the shim is.
 *
 * Who may call what: a controller belongs to one OS thread of the caller's, which makes all the calls here that take a
 * controller. A queue pair is used by one thread at a time. During gaur_nvme_reset() nobody else may use the controller
 * or any of its queue pairs. Several of these calls wait for the device, some of them without a limit of their own
 * (SPDK's driver polls for the answer to its own commands); it is the caller's business to keep such a thread for it.
 */
#ifndef GAUR_NVME_H
#define GAUR_NVME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "gaur_spdk.h"

struct spdk_nvme_cpl;
struct spdk_nvme_ctrlr;
struct spdk_nvme_ns;
struct spdk_nvme_qpair;

struct gaur_nvme_opts {
	/* In SPDK's own notation: "trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:4420 subnqn:NQN". */
	const char *transport_id;
	/* The host's NVMe qualified name, or NULL for SPDK's own choice. */
	const char *host_nqn;
	/* Entries of an I/O queue to ask for. */
	uint32_t queue_entries;
	/* Keep-alive timeout in milliseconds (fabrics). */
	uint32_t keep_alive_ms;
	/* How long the driver waits for each step when it (re)initialises the controller; 0 for SPDK's own choice. */
	uint32_t init_timeout_ms;
	/* CRC32C over the headers and the data of NVMe/TCP. */
	bool header_digest;
	bool data_digest;
};

/* Attaches a controller. Returns 0; -EINVAL (the transport id is malformed); -EPROTONOSUPPORT (this SPDK was built without
 * the transport); -ENODEV (it could not be attached; SPDK's log says more). */
int gaur_nvme_attach(const struct gaur_nvme_opts *opts, struct spdk_nvme_ctrlr **out);
/* Shuts the controller down and lets it go. No queue pair of it exists any more. */
void gaur_nvme_detach(struct spdk_nvme_ctrlr *ctrlr);

/* Asks the controller to be silent about namespaces that come and go. SPDK takes a namespace that went apart where it is,
 * while others may be starting I/O on it, which then never ends (20.07: it splits it into pieces of no blocks). After
 * attaching and after each reset, before there are queue pairs. Returns 0 or a negative errno. */
int gaur_nvme_keep_namespaces(struct spdk_nvme_ctrlr *ctrlr, uint32_t timeout_ms);

struct gaur_nvme_ctrlr_info {
	char model[41];
	char serial[21];
	char firmware[9];
	/* Namespaces that it can have. */
	uint32_t namespaces;
	/* Bytes of the largest transfer. */
	uint32_t max_transfer;
	/* Largest queue. */
	uint32_t max_queue_entries;
	/* Blocks written atomically under power failure. */
	uint32_t atomic_blocks;
	bool volatile_cache;
	bool pcie;
};
void gaur_nvme_get_ctrlr_info(struct spdk_nvme_ctrlr *ctrlr, struct gaur_nvme_ctrlr_info *out);

struct gaur_nvme_ns_info {
	uint64_t blocks;
	uint32_t block_size;
	/* Bytes of metadata per block. */
	uint32_t metadata;
	/* Type of end-to-end protection information; 0: none. */
	uint32_t protection;
	/* Requests that cross a multiple of so many blocks are slow; 0: none. */
	uint32_t boundary_blocks;
	/* Blocks written atomically under power failure, and the boundary that such a write may not cross (0: none). */
	uint32_t atomic_blocks;
	uint32_t atomic_boundary;
	bool can_unmap;
	bool can_write_zeroes;
	/* NGUID and EUI-64; zeroes where there is none. */
	uint8_t id[24];
};
/* Returns 0 or -ENODEV (no such active namespace). */
int gaur_nvme_get_ns_info(struct spdk_nvme_ctrlr *ctrlr, uint32_t nsid, struct gaur_nvme_ns_info *out);

/* A connected queue pair, or NULL. Doorbells are rung when completions are processed, where the transport can. */
struct spdk_nvme_qpair *gaur_nvme_alloc_qpair(struct spdk_nvme_ctrlr *ctrlr, uint32_t entries, uint32_t requests);

/* Resets the controller: 0 or a negative errno. Afterwards its I/O queue pairs are connected, or can be
 * (spdk_nvme_ctrlr_reconnect_io_qpair()), or must be freed. */
int gaur_nvme_reset(struct spdk_nvme_ctrlr *ctrlr);
/* Whether a PCIe controller does not answer on the bus any more. */
bool gaur_nvme_is_removed(struct spdk_nvme_ctrlr *ctrlr);
/* Takes away a PCIe controller's right to read and write memory (bus mastering), for good. */
void gaur_nvme_revoke_dma(struct spdk_nvme_ctrlr *ctrlr);
/* Puts memory full of ones in place of the registers of a PCIe controller that was removed: what SPDK reads there from now
 * on says so, and what it writes reaches no other device that got the addresses. In nobody else's use. */
void gaur_nvme_cover_registers(struct spdk_nvme_ctrlr *ctrlr);
/* Asks the controller to give up the command that was started with this callback argument. The command itself is
 * answered as ever. Returns 0 when the abort was sent. The queue pair must be in nobody else's use. */
int gaur_nvme_abort(struct spdk_nvme_ctrlr *ctrlr, struct spdk_nvme_qpair *qpair, void *arg);

/* Deallocates blocks (at most 2^32 - 1). Same rules and results as SPDK's own I/O calls. */
int gaur_nvme_unmap(struct spdk_nvme_ns *ns, struct spdk_nvme_qpair *qpair, uint64_t block, uint64_t blocks,
		    void (*done)(void *arg, const struct spdk_nvme_cpl *cpl), void *arg);

/* Where the status is in a completion queue entry: the offset of the 16 bits that hold it, with the phase tag as the
 * lowest bit (NVMe Base Specification, completion queue entry, dword 3). */
size_t gaur_nvme_status_offset(void);

#endif
