/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * See gaur_nvme.h.
 */
#include "gaur_nvme.h"

#include "spdk/stdinc.h"

#include "spdk/env.h"
#include "spdk/nvme.h"
#include "spdk/nvme_spec.h"

int
gaur_nvme_attach(const struct gaur_nvme_opts *opts, struct spdk_nvme_ctrlr **out)
{
	struct spdk_nvme_transport_id trid;
	struct spdk_nvme_ctrlr_opts ctrlr_opts;

	memset(&trid, 0, sizeof(trid));
	if (spdk_nvme_transport_id_parse(&trid, opts->transport_id) != 0) {
		return -EINVAL;
	}
	if (!spdk_nvme_transport_available_by_name(trid.trstring)) {
		return -EPROTONOSUPPORT;
	}
	spdk_nvme_ctrlr_get_default_ctrlr_opts(&ctrlr_opts, sizeof(ctrlr_opts));
	ctrlr_opts.io_queue_size = opts->queue_entries;
	ctrlr_opts.keep_alive_timeout_ms = opts->keep_alive_ms;
	if (opts->init_timeout_ms != 0) {
		ctrlr_opts.admin_timeout_ms = opts->init_timeout_ms;
	}
	ctrlr_opts.header_digest = opts->header_digest;
	ctrlr_opts.data_digest = opts->data_digest;
	/* Failed commands are answered with their status; who asked will say. */
	ctrlr_opts.disable_error_logging = true;
	if (opts->host_nqn != NULL) {
		snprintf(ctrlr_opts.hostnqn, sizeof(ctrlr_opts.hostnqn), "%s", opts->host_nqn);
	}
	*out = spdk_nvme_connect(&trid, &ctrlr_opts, sizeof(ctrlr_opts));
	return *out == NULL ? -ENODEV : 0;
}

void
gaur_nvme_detach(struct spdk_nvme_ctrlr *ctrlr)
{
	spdk_nvme_detach(ctrlr);
}

struct feature_wait {
	bool done;
	bool failed;
};

static void
feature_done(void *arg, const struct spdk_nvme_cpl *cpl)
{
	struct feature_wait *wait = arg;

	wait->failed = spdk_nvme_cpl_is_error(cpl);
	wait->done = true;
}

int
gaur_nvme_keep_namespaces(struct spdk_nvme_ctrlr *ctrlr, uint32_t timeout_ms)
{
	/* What else SPDK asks to be told, and that it only logs: the five critical warnings (NVMe Base Specification,
	 * asynchronous event configuration). */
	enum { CRITICAL_WARNINGS = 0x1f };
	uint64_t deadline = spdk_get_ticks() + spdk_get_ticks_hz() / 1000 * timeout_ms;
	struct feature_wait *wait;
	int rc;

	if (!spdk_nvme_ctrlr_get_data(ctrlr)->oaes.ns_attribute_notices) {
		return 0;
	}
	wait = calloc(1, sizeof(*wait));
	if (wait == NULL) {
		return -ENOMEM;
	}
	rc = spdk_nvme_ctrlr_cmd_set_feature(ctrlr, SPDK_NVME_FEAT_ASYNC_EVENT_CONFIGURATION, CRITICAL_WARNINGS, 0,
					     NULL, 0, feature_done, wait);
	while (rc == 0 && !wait->done) {
		if (spdk_nvme_ctrlr_process_admin_completions(ctrlr) < 0 || spdk_get_ticks() > deadline) {
			/* The command may still be answered: its place stays. */
			return wait->done ? -EIO : -ETIMEDOUT;
		}
	}
	if (rc == 0 && wait->failed) {
		rc = -EIO;
	}
	free(wait);
	return rc;
}

/* NVMe strings are padded with spaces and not terminated. */
static void
copy_string(char *out, const int8_t *in, size_t len)
{
	memcpy(out, in, len);
	out[len] = '\0';
	while (len > 0 && (out[len - 1] == ' ' || out[len - 1] == '\0')) {
		out[--len] = '\0';
	}
}

void
gaur_nvme_get_ctrlr_info(struct spdk_nvme_ctrlr *ctrlr, struct gaur_nvme_ctrlr_info *out)
{
	const struct spdk_nvme_ctrlr_data *data = spdk_nvme_ctrlr_get_data(ctrlr);
	union spdk_nvme_cap_register cap = spdk_nvme_ctrlr_get_regs_cap(ctrlr);

	memset(out, 0, sizeof(*out));
	copy_string(out->model, data->mn, sizeof(data->mn));
	copy_string(out->serial, data->sn, sizeof(data->sn));
	copy_string(out->firmware, (const int8_t *)&data->fr, sizeof(data->fr));
	out->namespaces = spdk_nvme_ctrlr_get_num_ns(ctrlr);
	out->max_transfer = spdk_nvme_ctrlr_get_max_xfer_size(ctrlr);
	out->max_queue_entries = (uint32_t)cap.bits.mqes + 1;
	out->atomic_blocks = (uint32_t)data->awupf + 1;
	out->volatile_cache = data->vwc.present;
	out->pcie = spdk_nvme_ctrlr_get_pci_device(ctrlr) != NULL;
}

int
gaur_nvme_get_ns_info(struct spdk_nvme_ctrlr *ctrlr, uint32_t nsid, struct gaur_nvme_ns_info *out)
{
	const struct spdk_nvme_ctrlr_data *ctrlr_data = spdk_nvme_ctrlr_get_data(ctrlr);
	const struct spdk_nvme_ns_data *data;
	struct spdk_nvme_ns *ns;
	uint32_t flags;

	ns = nsid == 0 ? NULL : spdk_nvme_ctrlr_get_ns(ctrlr, nsid);
	if (ns == NULL || !spdk_nvme_ns_is_active(ns)) {
		return -ENODEV;
	}
	data = spdk_nvme_ns_get_data(ns);
	flags = spdk_nvme_ns_get_flags(ns);
	memset(out, 0, sizeof(*out));
	out->blocks = spdk_nvme_ns_get_num_sectors(ns);
	out->block_size = spdk_nvme_ns_get_sector_size(ns);
	out->metadata = spdk_nvme_ns_get_md_size(ns);
	out->protection = (flags & SPDK_NVME_NS_DPS_PI_SUPPORTED) ? (uint32_t)spdk_nvme_ns_get_pi_type(ns) : 0;
	out->boundary_blocks = spdk_nvme_ns_get_optimal_io_boundary(ns);
	out->atomic_blocks = (uint32_t)ctrlr_data->awupf + 1;
	if (data->nsfeat.ns_atomic_write_unit) {
		out->atomic_blocks = (uint32_t)data->nawupf + 1;
		out->atomic_boundary = data->nabspf == 0 ? 0 : (uint32_t)data->nabspf + 1;
	}
	out->can_unmap = (flags & SPDK_NVME_NS_DEALLOCATE_SUPPORTED) != 0;
	out->can_write_zeroes = (flags & SPDK_NVME_NS_WRITE_ZEROES_SUPPORTED) != 0;
	memcpy(out->id, data->nguid, sizeof(data->nguid));
	memcpy(out->id + sizeof(data->nguid), &data->eui64, sizeof(data->eui64));
	return 0;
}

struct spdk_nvme_qpair *
gaur_nvme_alloc_qpair(struct spdk_nvme_ctrlr *ctrlr, uint32_t entries, uint32_t requests)
{
	struct spdk_nvme_io_qpair_opts opts;
	struct spdk_nvme_qpair *qpair;

	spdk_nvme_ctrlr_get_default_io_qpair_opts(ctrlr, &opts, sizeof(opts));
	opts.io_queue_size = entries;
	opts.io_queue_requests = requests;
	opts.delay_cmd_submit = true;
	/* In two steps: when connecting fails inside of the allocation, 20.07 keeps the freed queue pair in a list, and
	 * a later detach dies of it. */
	opts.create_only = true;
	qpair = spdk_nvme_ctrlr_alloc_io_qpair(ctrlr, &opts, sizeof(opts));
	if (qpair != NULL && spdk_nvme_ctrlr_connect_io_qpair(ctrlr, qpair) != 0) {
		spdk_nvme_ctrlr_free_io_qpair(qpair);
		qpair = NULL;
	}
	return qpair;
}

int
gaur_nvme_reset(struct spdk_nvme_ctrlr *ctrlr)
{
	int rc = spdk_nvme_ctrlr_reset(ctrlr);

	return rc == 0 ? 0 : rc < -1 ? rc : -EIO;
}

bool
gaur_nvme_is_removed(struct spdk_nvme_ctrlr *ctrlr)
{
	struct spdk_pci_device *device = spdk_nvme_ctrlr_get_pci_device(ctrlr);
	uint32_t ids = 0;

	if (device == NULL) {
		return false;
	}
	/* Reads of configuration space and registers give all ones when nobody answers; no device has such an id. */
	if (spdk_pci_device_cfg_read32(device, &ids, 0) != 0 || ids == UINT32_MAX) {
		return true;
	}
	return spdk_nvme_ctrlr_get_regs_csts(ctrlr).raw == UINT32_MAX;
}

void
gaur_nvme_revoke_dma(struct spdk_nvme_ctrlr *ctrlr)
{
	/* The command register and its bus master enable bit (PCI Local Bus Specification 3.0, 6.2.2). */
	enum { COMMAND = 4, BUS_MASTER = 1 << 2 };
	struct spdk_pci_device *device = spdk_nvme_ctrlr_get_pci_device(ctrlr);
	uint16_t command = 0;

	if (device != NULL && spdk_pci_device_cfg_read16(device, &command, COMMAND) == 0) {
		spdk_pci_device_cfg_write16(device, (uint16_t)(command & ~BUS_MASTER), COMMAND);
	}
}

void
gaur_nvme_cover_registers(struct spdk_nvme_ctrlr *ctrlr)
{
	struct spdk_pci_device *device = spdk_nvme_ctrlr_get_pci_device(ctrlr);
	uint64_t physical = 0, size = 0;
	void *registers = NULL;

	/* Registers and doorbells are in BAR 0 (NVMe over PCIe Transport Specification); SPDK has mapped it, and says where. */
	if (device == NULL || spdk_pci_device_map_bar(device, 0, &registers, &physical, &size) != 0 ||
	    registers == NULL || size == 0) {
		return;
	}
	if (mmap(registers, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED) {
		memset(registers, 0xff, size);
	}
}

static void
abort_done(void *arg, const struct spdk_nvme_cpl *cpl)
{
	/* Whether or not it came in time: the command itself tells. */
	(void)arg;
	(void)cpl;
}

int
gaur_nvme_abort(struct spdk_nvme_ctrlr *ctrlr, struct spdk_nvme_qpair *qpair, void *arg)
{
	return spdk_nvme_ctrlr_cmd_abort_ext(ctrlr, qpair, arg, abort_done, NULL);
}

int
gaur_nvme_unmap(struct spdk_nvme_ns *ns, struct spdk_nvme_qpair *qpair, uint64_t block, uint64_t blocks,
		void (*done)(void *arg, const struct spdk_nvme_cpl *cpl), void *arg)
{
	struct spdk_nvme_dsm_range range;

	memset(&range, 0, sizeof(range));
	range.starting_lba = block;
	range.length = (uint32_t)blocks;
	/* SPDK copies the range. */
	return spdk_nvme_ns_cmd_dataset_management(ns, qpair, SPDK_NVME_DSM_ATTR_DEALLOCATE, &range, 1, done, arg);
}

size_t
gaur_nvme_status_offset(void)
{
	return offsetof(struct spdk_nvme_cpl, status);
}
