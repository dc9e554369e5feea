/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * What bindgen reads. The allow list is in build.rs.
 */
#include "spdk/stdinc.h"
#include "spdk/bdev.h"
#include "spdk/env.h"
#include "spdk/nvme.h"
#include "spdk/thread.h"
#include "spdk/version.h"
#include "gaur_blobfs.h"
#include "gaur_nvme.h"
#include "gaur_spdk.h"
