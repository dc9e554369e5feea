/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * BlobFS, where the installed SPDK has it (up to 25.05): for measurements beside it, and nothing else.
 *
 * It is used as its users did: one SPDK thread does all of it, called the reactor here; other OS threads make blocking
 * calls, which become messages to the reactor and sleep until it has answered. Whoever owns the reactor must poll it from
 * gaur_blobfs_init() until gaur_blobfs_unload() is done, and the thread of BlobFS's cache with it as soon as there is one.
 *
 * One filesystem at a time in a process.
 */
#ifndef GAUR_BLOBFS_H
#define GAUR_BLOBFS_H

#include "gaur_spdk.h"

struct gaur_blobfs;
struct gaur_blobfs_file;

/* Whether this SPDK has BlobFS. Without it all others fail with -ENOTSUP. */
bool gaur_blobfs_exists(void);

/* ---- inside the reactor ------------------------------------------------------------------------------------------ */

/* Makes an empty filesystem on a bdev, or loads the one that is there, with a cache of cache_mib MiB. When wait is done with rc 0 it can be used. NULL: not even
 * begun, and wait->rc says why. wait must live until done. */
struct gaur_blobfs *gaur_blobfs_init(const char *bdev, bool load, uint64_t cache_mib, struct gaur_wait *wait);
/* The thread of its cache, when there is a filesystem. To be polled once before the first call. NULL: there is none. */
struct spdk_thread *gaur_blobfs_cache_thread(void);
/* Takes the filesystem down; all files are closed. fs is gone when wait is done. The thread of the cache is to be destroyed
 * afterwards. */
void gaur_blobfs_unload(struct gaur_blobfs *fs, struct gaur_wait *wait);

/* ---- on any OS thread that is inside no SPDK thread, while the reactor is polled by another ----------------------- */

/* Opens a file, which is created if there is none. One thread at a time uses it. NULL: *rc says why. */
struct gaur_blobfs_file *gaur_blobfs_open(struct gaur_blobfs *fs, const char *name, int *rc);
/* Closes it, and deletes it on wish. 0 or -errno; file is gone in any case. */
int gaur_blobfs_close(struct gaur_blobfs_file *file, bool delete);
/* Bytes read, or -errno. */
int64_t gaur_blobfs_read(struct gaur_blobfs_file *file, void *buf, uint64_t offset, uint64_t len);
/* Writes at the end of the file. 0 or -errno. What is not synced must fit into the cache: 20.07 crashes when a write finds no
 * room there. */
int gaur_blobfs_append(struct gaur_blobfs_file *file, void *buf, uint64_t len);
/* 0 or -errno. */
int gaur_blobfs_sync(struct gaur_blobfs_file *file);

#endif
