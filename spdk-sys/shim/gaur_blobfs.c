/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * See gaur_blobfs.h.
 */
#include "gaur_blobfs.h"

#include "spdk/stdinc.h"

#include "spdk/bdev.h"
#include "spdk/thread.h"

#ifdef GAUR_HAVE_BLOBFS

#include "spdk/blob_bdev.h"
#include "spdk/blobfs.h"

struct gaur_blobfs {
	struct spdk_filesystem *fs;
	struct gaur_wait *wait;
};

struct gaur_blobfs_file {
	struct gaur_blobfs *fs;
	struct spdk_fs_thread_ctx *ctx;
	struct spdk_file *file;
	uint64_t length;
	char name[64];
};

/* BlobFS asks for a function without an argument of ours. */
static struct spdk_thread *g_reactor;

static void
send_to_reactor(fs_request_fn fn, void *arg)
{
	spdk_thread_send_msg(g_reactor, fn, arg);
}

static void
finish(struct gaur_blobfs *fs, int rc)
{
	struct gaur_wait *wait = fs->wait;

	wait->rc = rc;
	wait->done = true;
}

static void
init_done(void *arg, struct spdk_filesystem *made, int rc)
{
	struct gaur_blobfs *fs = arg;

	fs->fs = made;
	finish(fs, rc);
}

#ifdef GAUR_HAVE_BS_DEV_EXT
static void
on_event(enum spdk_bdev_event_type type, struct spdk_bdev *bdev, void *ctx)
{
	(void)type;
	(void)bdev;
	(void)ctx;
}
#endif

static struct spdk_bs_dev *
open_bs_dev(const char *name, int *rc)
{
	struct spdk_bs_dev *dev = NULL;

#ifdef GAUR_HAVE_BS_DEV_EXT
	*rc = spdk_bdev_create_bs_dev_ext(name, on_event, NULL, &dev);
#else
	struct spdk_bdev *bdev = spdk_bdev_get_by_name(name);

	*rc = -ENODEV;
	if (bdev != NULL) {
		dev = spdk_bdev_create_bs_dev(bdev, NULL, NULL);
		*rc = dev != NULL ? 0 : -EBUSY;
	}
#endif
	return dev;
}

bool
gaur_blobfs_exists(void)
{
	return true;
}

struct gaur_blobfs *
gaur_blobfs_init(const char *bdev, bool load, uint64_t cache_mib, struct gaur_wait *wait)
{
	struct gaur_blobfs *fs = calloc(1, sizeof(*fs));
	struct spdk_blobfs_opts opts;
	struct spdk_bs_dev *dev;

	wait->done = false;
	wait->rc = -ENOMEM;
	if (fs == NULL) {
		return NULL;
	}
	dev = open_bs_dev(bdev, &wait->rc);
	if (dev == NULL) {
		free(fs);
		return NULL;
	}
	fs->wait = wait;
	g_reactor = spdk_get_thread();
	spdk_fs_set_cache_size(cache_mib);
	if (load) {
		spdk_fs_load(dev, send_to_reactor, init_done, fs);
	} else {
		spdk_fs_opts_init(&opts);
		spdk_fs_init(dev, &opts, send_to_reactor, init_done, fs);
	}
	return fs;
}

/* BlobFS makes a thread for its cache, leaves it to the application's scheduler, and tells nobody. */
struct spdk_thread *
gaur_blobfs_cache_thread(void)
{
	uint64_t id;

	for (id = 1; id < 4096; id++) {
		struct spdk_thread *thread = spdk_thread_get_by_id(id);

		if (thread != NULL && strcmp(spdk_thread_get_name(thread), "cache_pool_mgmt") == 0 &&
		    !spdk_thread_is_exited(thread)) {
			return thread;
		}
	}
	return NULL;
}

static void
unload_done(void *arg, int rc)
{
	struct gaur_blobfs *fs = arg;

	finish(fs, rc);
	free(fs);
}

void
gaur_blobfs_unload(struct gaur_blobfs *fs, struct gaur_wait *wait)
{
	wait->done = false;
	wait->rc = 0;
	fs->wait = wait;
	spdk_fs_unload(fs->fs, unload_done, fs);
}

struct gaur_blobfs_file *
gaur_blobfs_open(struct gaur_blobfs *fs, const char *name, int *rc)
{
	struct gaur_blobfs_file *file = calloc(1, sizeof(*file));

	*rc = -ENOMEM;
	if (file == NULL) {
		return NULL;
	}
	file->fs = fs;
	snprintf(file->name, sizeof(file->name), "%s", name);
	file->ctx = spdk_fs_alloc_thread_ctx(fs->fs);
	if (file->ctx == NULL) {
		free(file);
		return NULL;
	}
	*rc = spdk_fs_open_file(fs->fs, file->ctx, file->name, SPDK_BLOBFS_OPEN_CREATE, &file->file);
	if (*rc != 0) {
		spdk_fs_free_thread_ctx(file->ctx);
		free(file);
		return NULL;
	}
	file->length = spdk_file_get_length(file->file);
	return file;
}

int
gaur_blobfs_close(struct gaur_blobfs_file *file, bool delete)
{
	int rc = spdk_file_close(file->file, file->ctx);

	if (rc == 0 && delete) {
		rc = spdk_fs_delete_file(file->fs->fs, file->ctx, file->name);
	}
	spdk_fs_free_thread_ctx(file->ctx);
	free(file);
	return rc;
}

int64_t
gaur_blobfs_read(struct gaur_blobfs_file *file, void *buf, uint64_t offset, uint64_t len)
{
	return spdk_file_read(file->file, file->ctx, buf, offset, len);
}

int
gaur_blobfs_append(struct gaur_blobfs_file *file, void *buf, uint64_t len)
{
	int rc = spdk_file_write(file->file, file->ctx, buf, file->length, len);

	if (rc == 0) {
		file->length += len;
	}
	return rc;
}

int
gaur_blobfs_sync(struct gaur_blobfs_file *file)
{
	return spdk_file_sync(file->file, file->ctx);
}

#else

bool
gaur_blobfs_exists(void)
{
	return false;
}

struct gaur_blobfs *
gaur_blobfs_init(const char *bdev, bool load, uint64_t cache_mib, struct gaur_wait *wait)
{
	(void)bdev;
	(void)load;
	(void)cache_mib;
	wait->done = false;
	wait->rc = -ENOTSUP;
	return NULL;
}

struct spdk_thread *
gaur_blobfs_cache_thread(void)
{
	return NULL;
}

void
gaur_blobfs_unload(struct gaur_blobfs *fs, struct gaur_wait *wait)
{
	(void)fs;
	wait->rc = -ENOTSUP;
	wait->done = true;
}

struct gaur_blobfs_file *
gaur_blobfs_open(struct gaur_blobfs *fs, const char *name, int *rc)
{
	(void)fs;
	(void)name;
	*rc = -ENOTSUP;
	return NULL;
}

int
gaur_blobfs_close(struct gaur_blobfs_file *file, bool delete)
{
	(void)file;
	(void)delete;
	return -ENOTSUP;
}

int64_t
gaur_blobfs_read(struct gaur_blobfs_file *file, void *buf, uint64_t offset, uint64_t len)
{
	(void)file;
	(void)buf;
	(void)offset;
	(void)len;
	return -ENOTSUP;
}

int
gaur_blobfs_append(struct gaur_blobfs_file *file, void *buf, uint64_t len)
{
	(void)file;
	(void)buf;
	(void)len;
	return -ENOTSUP;
}

int
gaur_blobfs_sync(struct gaur_blobfs_file *file)
{
	(void)file;
	return -ENOTSUP;
}

#endif
