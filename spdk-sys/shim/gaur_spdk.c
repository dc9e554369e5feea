/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * See gaur_spdk.h.
 */
#include "gaur_spdk.h"

#include "spdk/stdinc.h"

#include "spdk/bdev.h"
#include "spdk/bdev_module.h"
#include "spdk/bdev_zone.h"
#include "spdk/env.h"
#ifndef GAUR_HAVE_NO_HUGE
#include "spdk/env_dpdk.h"
#endif
#include "spdk/json.h"
#include "spdk/jsonrpc.h"
#include "spdk/log.h"
#include "spdk/nvme_spec.h"
#include "spdk/rpc.h"
#include "spdk/thread.h"
#include "spdk/util.h"
#include "spdk/version.h"

#include <sched.h>

#ifdef GAUR_HAVE_INIT_H
#include "spdk/init.h"
#else
/* Before 21.04 these were declared in an internal header that is not installed. */
typedef void (*spdk_subsystem_init_fn)(int rc, void *ctx);
void spdk_subsystem_init(spdk_subsystem_init_fn cb_fn, void *cb_arg);
#endif

static void fill_message(char message[GAUR_SPDK_MESSAGE], const char *format, ...)
	__attribute__((format(printf, 2, 3)));

static void
fill_message(char message[GAUR_SPDK_MESSAGE], const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(message, GAUR_SPDK_MESSAGE, format, args);
	va_end(args);
}

/* ---- versions and layouts ---------------------------------------------------------------------------------------- */

uint32_t
gaur_spdk_api(void)
{
	return GAUR_SPDK_API;
}

const char *
gaur_spdk_version(void)
{
	return SPDK_VERSION_STRING;
}

uint32_t
gaur_spdk_version_number(void)
{
	return SPDK_VERSION;
}

void
gaur_get_layout(struct gaur_layout *out)
{
	out->iovec_size = sizeof(struct iovec);
	out->iovec_base_offset = offsetof(struct iovec, iov_base);
	out->iovec_len_offset = offsetof(struct iovec, iov_len);
	out->env_opts_size = sizeof(struct gaur_env_opts);
	out->bdev_info_size = sizeof(struct gaur_bdev_info);
	out->io_error_size = sizeof(struct gaur_io_error);
	out->config_entry_size = sizeof(struct gaur_config_entry);
	out->bool_size = sizeof(bool);
	out->size_t_size = sizeof(size_t);
	out->spdk_env_opts_size = sizeof(struct spdk_env_opts);
}

/* ---- environment ------------------------------------------------------------------------------------------------- */

static gaur_log_fn g_log_fn;

static void
log_to_fn(int level, const char *file, const int line, const char *func, const char *format, va_list args)
{
	char text[1024];
	size_t len;

	(void)func;
	vsnprintf(text, sizeof(text), format, args);
	len = strlen(text);
	while (len > 0 && text[len - 1] == '\n') {
		text[--len] = '\0';
	}
	if (len > 0) {
		g_log_fn(level, file != NULL ? file : "", line, text);
	}
}

/* DPDK's, and not in a header of SPDK's. */
int rte_openlog_stream(FILE *stream);

/* Gets DPDK's messages, in whatever pieces stdio writes them. */
static ssize_t
dpdk_log_write(void *cookie, const char *data, size_t size)
{
	char text[1024];
	const char *end = data + size, *line = data, *stop;

	(void)cookie;
	while (line < end) {
		stop = memchr(line, '\n', (size_t)(end - line));
		if (stop == NULL) {
			stop = end;
		}
		snprintf(text, sizeof(text), "%.*s", (int)(stop - line), line);
		if (text[0] != '\0') {
			g_log_fn(GAUR_LOG_DPDK, "dpdk", 0, text);
		}
		line = stop + 1;
	}
	return (ssize_t)size;
}

static FILE *g_dpdk_log;

void
gaur_log_open(gaur_log_fn fn)
{
	static const cookie_io_functions_t functions = { .write = dpdk_log_write };

	g_log_fn = fn;
	spdk_log_open(log_to_fn);
	g_dpdk_log = fopencookie(NULL, "w", functions);
	if (g_dpdk_log != NULL) {
		setvbuf(g_dpdk_log, NULL, _IOLBF, 1024);
		rte_openlog_stream(g_dpdk_log);
	}
}

#ifndef GAUR_HAVE_NO_HUGE
/* DPDK's, and not in a header of SPDK's. */
int rte_eal_init(int argc, char **argv);
extern __thread int per_lcore__rte_errno;

/* Initialises DPDK without spdk_env_init(), which before 24.01 cannot
 *  - do without huge pages: it always says --match-allocations, which DPDK refuses together with --no-huge;
 *  - (20.07) say --no-telemetry beside --in-memory: it takes one option of ours. DPDK then makes a socket of one name for
 *    all processes in /tmp, and initialisation fails where another user's process has made it, or left it there.
 * Programs that initialise DPDK themselves have spdk_env_dpdk_post_init(). The options are the ones of spdk_env_init();
 * the address is on a boundary of 2 MiB, which SPDK's memory map wants. */
static int
eal_init(const struct gaur_env_opts *opts)
{
	char name[64], cores[24], memory[24], prefix[40];
	/* DPDK reorders the array; the strings are ours. */
	char *argv[16];
	int argc = 0, saved_optind = optind, rc;

	snprintf(name, sizeof(name), "%s", opts->name);
	snprintf(cores, sizeof(cores), "-l%" PRIu32, opts->core);
	snprintf(memory, sizeof(memory), "-m%" PRId32, opts->mem_mib);
	snprintf(prefix, sizeof(prefix), "--file-prefix=spdk_pid%d", getpid());
	argv[argc++] = name;
	argv[argc++] = cores;
	argv[argc++] = prefix;
	argv[argc++] = "--iova-mode=va";
	argv[argc++] = "--no-telemetry";
	argv[argc++] = "--base-virtaddr=0x200000000000";
	argv[argc++] = "--log-level=lib.eal:6";
	argv[argc++] = "--log-level=lib.cryptodev:5";
	argv[argc++] = "--log-level=user1:6";
	if (opts->no_huge) {
		argv[argc++] = "--no-huge";
		argv[argc++] = "--no-shconf";
	} else {
		argv[argc++] = "--in-memory";
		argv[argc++] = "--match-allocations";
	}
	if (opts->mem_mib >= 0) {
		argv[argc++] = memory;
	}
	if (opts->no_pci || opts->no_huge) {
		argv[argc++] = "--no-pci";
	}
	argv[argc] = NULL;

	optind = 1;
	rc = rte_eal_init(argc, argv);
	optind = saved_optind;
	if (rc < 0) {
		return per_lcore__rte_errno == 0 ? -EINVAL : -per_lcore__rte_errno;
	}
	return spdk_env_dpdk_post_init(opts->no_huge);
}
#endif

static int
env_init(const struct spdk_env_opts *env, const struct gaur_env_opts *opts)
{
#ifndef GAUR_HAVE_NO_HUGE
	/* Root may remove any socket, and spdk_env_init() knows more about physical addresses. */
	if (opts->no_huge || opts->iova_va) {
		return eal_init(opts);
	}
#else
	(void)opts; /* all of it is in env */
#endif
	return spdk_env_init(env);
}

/* Some versions greet the user on standard output when they start, which belongs to the program. */
static int
env_init_quietly(const struct spdk_env_opts *env, const struct gaur_env_opts *opts)
{
#ifdef __GLIBC__
	FILE *out = stdout;
	int rc;

	if (g_dpdk_log != NULL) {
		stdout = g_dpdk_log;
	}
	rc = env_init(env, opts);
	if (g_dpdk_log != NULL) {
		fflush(g_dpdk_log);
	}
	stdout = out;
	return rc;
#else
	return env_init(env, opts);
#endif
}

int
gaur_env_init(const struct gaur_env_opts *opts)
{
	struct spdk_env_opts env;
	/* As many CPUs as any kernel is built for; the static cpu_set_t stops at 1024. */
	enum { CPUS = 8192 };
	size_t set_size = CPU_ALLOC_SIZE(CPUS);
	cpu_set_t *affinity;
	char core_list[32];
	int rc;

	if (opts->no_huge && opts->mem_mib <= 0) {
		return -EINVAL;
	}
	affinity = CPU_ALLOC(CPUS);
	if (affinity == NULL) {
		return -ENOMEM;
	}
	if (sched_getaffinity(0, set_size, affinity) != 0) {
		rc = -errno;
		CPU_FREE(affinity);
		return rc;
	}

	memset(&env, 0, sizeof(env));
#ifdef GAUR_HAVE_ENV_OPTS_SIZE
	env.opts_size = sizeof(env);
#endif
	spdk_env_opts_init(&env);
	snprintf(core_list, sizeof(core_list), "[%" PRIu32 "]", opts->core);
	env.name = opts->name;
	env.core_mask = core_list;
	env.mem_size = opts->mem_mib;
	env.no_pci = opts->no_pci;
	if (opts->iova_va) {
		env.iova_mode = "va";
	}
	/* Huge pages without files in hugetlbfs: a killed process leaves nothing behind, and no mount is needed. (SPDK's
	 * own unlink_hugepage would do as much, but DPDK 20.05 then cannot allocate a page again that was freed.) */
	env.env_context = (void *)"--in-memory";
	if (opts->no_huge) {
		/* DPDK has no --in-memory of ordinary pages. */
		env.env_context = NULL;
		env.no_pci = true;
		env.iova_mode = "va";
#ifdef GAUR_HAVE_NO_HUGE
		env.no_huge = true;
#endif
	}

	rc = env_init_quietly(&env, opts);

	/* DPDK has pinned this thread to its core. */
	if (sched_setaffinity(0, set_size, affinity) != 0 && rc == 0) {
		rc = -errno;
	}
	CPU_FREE(affinity);
	if (rc != 0) {
		return rc < 0 ? rc : -EINVAL;
	}
	rc = spdk_thread_lib_init(NULL, 0);
	return rc == 0 ? 0 : -ENOMEM;
}

/* ---- threads ----------------------------------------------------------------------------------------------------- */

int
gaur_thread_poll(struct spdk_thread *thread)
{
	return spdk_thread_poll(thread, 0, spdk_thread_get_last_tsc(thread));
}

bool
gaur_thread_destroy(struct spdk_thread *thread, uint32_t timeout_ms)
{
	struct spdk_thread *before = spdk_get_thread();
	uint64_t deadline = spdk_get_ticks() + spdk_get_ticks_hz() / 1000 * timeout_ms;

	if (before == thread) {
		before = NULL;
	}
	/* Channels are freed by messages of the thread to itself; and a message of another thread about a channel that
	 * is gone by now must be answered, or that thread waits for ever. */
	spdk_set_thread(thread);
	do {
		spdk_thread_poll(thread, 0, 0);
	} while (!spdk_thread_is_idle(thread) && spdk_get_ticks() < deadline);
	spdk_thread_exit(thread);
	while (!spdk_thread_is_exited(thread) && spdk_get_ticks() < deadline) {
		spdk_thread_poll(thread, 0, 0);
	}
	spdk_set_thread(before);
	if (!spdk_thread_is_exited(thread)) {
		return false;
	}
	spdk_thread_destroy(thread);
	return true;
}

/* ---- subsystems and configuration -------------------------------------------------------------------------------- */

void
gaur_rpc_set_runtime(bool runtime)
{
	spdk_rpc_set_state(runtime ? SPDK_RPC_RUNTIME : SPDK_RPC_STARTUP);
}

int
gaur_rpc_method_allowed(const char *method)
{
	return spdk_rpc_is_method_allowed(method, spdk_rpc_get_state());
}

static void
wait_done(int rc, void *arg)
{
	struct gaur_wait *wait = arg;

	wait->rc = rc;
	wait->done = true;
}

void
gaur_subsystems_init(struct gaur_wait *wait)
{
	wait->done = false;
	wait->rc = 0;
	spdk_subsystem_init(wait_done, wait);
}

#ifdef GAUR_HAVE_WAIT_FOR_EXAMINE
static void
examine_done(void *arg)
{
	wait_done(0, arg);
}
#endif

void
gaur_bdev_wait_for_examine(struct gaur_wait *wait)
{
	wait->done = false;
	wait->rc = 0;
#ifdef GAUR_HAVE_WAIT_FOR_EXAMINE
	int rc = spdk_bdev_wait_for_examine(examine_done, wait);

	if (rc != 0) {
		wait_done(rc, wait);
	}
#else
	wait->done = true;
#endif
}

struct gaur_config {
	char *text;
	struct spdk_json_val *values;
	struct gaur_config_entry *entries;
	size_t count;
	size_t capacity;
};

void
gaur_config_free(struct gaur_config *config)
{
	size_t i;

	if (config == NULL) {
		return;
	}
	for (i = 0; i < config->count; i++) {
		free((char *)config->entries[i].subsystem);
		free((char *)config->entries[i].method);
	}
	free(config->entries);
	free(config->values);
	free(config->text);
	free(config);
}

static struct gaur_config_entry *
config_push(struct gaur_config *config)
{
	struct gaur_config_entry *entries;
	size_t capacity;

	if (config->count == config->capacity) {
		capacity = config->capacity == 0 ? 16 : config->capacity * 2;
		entries = realloc(config->entries, capacity * sizeof(*entries));
		if (entries == NULL) {
			return NULL;
		}
		config->entries = entries;
		config->capacity = capacity;
	}
	memset(&config->entries[config->count], 0, sizeof(*config->entries));
	return &config->entries[config->count++];
}

/* How many values a parsed value takes in the flat array: containers include what is in them and their end. (SPDK's own
 * iterators stop at an empty first element in some versions.) */
static size_t
span(const struct spdk_json_val *value)
{
	if (value->type == SPDK_JSON_VAL_ARRAY_BEGIN || value->type == SPDK_JSON_VAL_OBJECT_BEGIN) {
		return (size_t)value->len + 2;
	}
	return 1;
}

/* The value of a key in a JSON object, if it is of that type, or NULL. */
static struct spdk_json_val *
member(struct spdk_json_val *object, const char *key, enum spdk_json_val_type type)
{
	struct spdk_json_val *name;

	if (object->type != SPDK_JSON_VAL_OBJECT_BEGIN) {
		return NULL;
	}
	for (name = object + 1; name->type != SPDK_JSON_VAL_OBJECT_END; name += 1 + span(name + 1)) {
		if (spdk_json_strequal(name, key)) {
			return name[1].type == type ? &name[1] : NULL;
		}
	}
	return NULL;
}

/* A terminated copy of the string member, or NULL. */
static char *
member_string(struct spdk_json_val *object, const char *key)
{
	struct spdk_json_val *value = member(object, key, SPDK_JSON_VAL_STRING);

	return value == NULL ? NULL : spdk_json_strdup(value);
}

/* Adds the calls of one element of "subsystems". Returns false, with a message, when it is malformed. */
static bool
config_add_subsystem(struct gaur_config *config, struct spdk_json_val *subsystem, char message[GAUR_SPDK_MESSAGE])
{
	struct spdk_json_val *calls, *call, *params, *params_end;
	struct gaur_config_entry *entry;
	char *name;
	bool ok = false;

	name = member_string(subsystem, "subsystem");
	if (name == NULL) {
		fill_message(message, "an element of \"subsystems\" has no \"subsystem\" name");
		return false;
	}
	calls = member(subsystem, "config", SPDK_JSON_VAL_ARRAY_BEGIN);
	if (calls == NULL) {
		/* Absent or null: the subsystem has no configuration. */
		free(name);
		return true;
	}
	for (call = calls + 1; call->type != SPDK_JSON_VAL_ARRAY_END; call += span(call)) {
		entry = config_push(config);
		if (entry == NULL) {
			fill_message(message, "out of memory");
			goto out;
		}
		entry->subsystem = strdup(name);
		entry->method = member_string(call, "method");
		if (entry->subsystem == NULL || entry->method == NULL) {
			fill_message(message, "a call in subsystem \"%s\" has no \"method\"", name);
			goto out;
		}
		params = member(call, "params", SPDK_JSON_VAL_OBJECT_BEGIN);
		if (params != NULL) {
			/* The matching end of the object; its text reaches from one brace to the other. */
			params_end = params + params->len + 1;
			entry->params = params->start;
			entry->params_len = (size_t)((char *)params_end->start - (char *)params->start) + 1;
		}
	}
	ok = true;
out:
	free(name);
	return ok;
}

struct gaur_config *
gaur_config_parse(const char *text, size_t len, char message[GAUR_SPDK_MESSAGE])
{
	struct gaur_config *config;
	struct spdk_json_val *subsystems, *subsystem;
	void *end = NULL;
	ssize_t count;

	message[0] = '\0';
	config = calloc(1, sizeof(*config));
	if (config == NULL || (config->text = malloc(len + 1)) == NULL) {
		fill_message(message, "out of memory");
		goto fail;
	}
	memcpy(config->text, text, len);
	config->text[len] = '\0';

	count = spdk_json_parse(config->text, len, NULL, 0, &end, SPDK_JSON_PARSE_FLAG_ALLOW_COMMENTS);
	if (count <= 0) {
		fill_message(message, "it is not JSON (near byte %zu)",
			     end == NULL ? (size_t)0 : (size_t)((char *)end - config->text));
		goto fail;
	}
	config->values = calloc((size_t)count, sizeof(*config->values));
	if (config->values == NULL) {
		fill_message(message, "out of memory");
		goto fail;
	}
	if (spdk_json_parse(config->text, len, config->values, (size_t)count, &end,
			    SPDK_JSON_PARSE_FLAG_ALLOW_COMMENTS) != count) {
		fill_message(message, "it is not JSON");
		goto fail;
	}
	subsystems = member(config->values, "subsystems", SPDK_JSON_VAL_ARRAY_BEGIN);
	if (subsystems == NULL) {
		fill_message(message, "it has no \"subsystems\" array");
		goto fail;
	}
	for (subsystem = subsystems + 1; subsystem->type != SPDK_JSON_VAL_ARRAY_END; subsystem += span(subsystem)) {
		if (!config_add_subsystem(config, subsystem, message)) {
			goto fail;
		}
	}
	return config;
fail:
	gaur_config_free(config);
	return NULL;
}

size_t
gaur_config_count(const struct gaur_config *config)
{
	return config->count;
}

const struct gaur_config_entry *
gaur_config_get(const struct gaur_config *config, size_t i)
{
	return &config->entries[i];
}

struct gaur_rpc {
#ifdef GAUR_HAVE_RPC_SERVER
	struct spdk_rpc_server *server;
#endif
	struct spdk_jsonrpc_client *client;
	/* Made by gaur_rpc_call(), sent once the client has connected and its last request is out. */
	struct spdk_jsonrpc_client_request *unsent;
	int32_t last_id;
};

struct gaur_rpc *
gaur_rpc_open(const char *socket_path, char message[GAUR_SPDK_MESSAGE])
{
	struct gaur_rpc *rpc;

	rpc = calloc(1, sizeof(*rpc));
	if (rpc == NULL) {
		fill_message(message, "out of memory");
		return NULL;
	}
#ifdef GAUR_HAVE_RPC_SERVER
	rpc->server = spdk_rpc_server_listen(socket_path);
	if (rpc->server == NULL) {
#else
	if (spdk_rpc_listen(socket_path) != 0) {
#endif
		fill_message(message, "cannot listen at %s", socket_path);
		free(rpc);
		return NULL;
	}
	rpc->client = spdk_jsonrpc_client_connect(socket_path, AF_UNIX);
	if (rpc->client == NULL) {
		fill_message(message, "cannot connect to %s", socket_path);
#ifdef GAUR_HAVE_RPC_SERVER
		spdk_rpc_server_close(rpc->server);
#else
		spdk_rpc_close();
#endif
		free(rpc);
		return NULL;
	}
	return rpc;
}

int32_t
gaur_rpc_call(struct gaur_rpc *rpc, const char *method, const char *params, size_t params_len)
{
	struct spdk_jsonrpc_client_request *request;
	struct spdk_json_write_ctx *w;

	if (rpc->unsent != NULL) {
		return -EBUSY;
	}
	request = spdk_jsonrpc_client_create_request();
	if (request == NULL) {
		return -ENOMEM;
	}
	rpc->last_id = rpc->last_id == INT32_MAX ? 1 : rpc->last_id + 1;
	w = spdk_jsonrpc_begin_request(request, rpc->last_id, method);
	if (w == NULL) {
		spdk_jsonrpc_client_free_request(request);
		return -ENOMEM;
	}
	if (params != NULL) {
		spdk_json_write_name(w, "params");
		spdk_json_write_val_raw(w, params, params_len);
	}
	spdk_jsonrpc_end_request(request, w);
	rpc->unsent = request;
	return rpc->last_id;
}

static void
server_poll(struct gaur_rpc *rpc)
{
#ifdef GAUR_HAVE_RPC_SERVER
	spdk_rpc_server_accept(rpc->server);
#else
	(void)rpc;
	spdk_rpc_accept();
#endif
}

int
gaur_rpc_poll(struct gaur_rpc *rpc, int32_t id, char message[GAUR_SPDK_MESSAGE])
{
	struct spdk_jsonrpc_client_response *response;
	struct spdk_json_val *text;
	int32_t answered = 0;
	int ready, rc;

	server_poll(rpc);
	ready = spdk_jsonrpc_client_poll(rpc->client, 0);
	if (ready == -ENOTCONN) {
		return 0;
	}
	if (ready < 0) {
		fill_message(message, "the RPC connection failed: %s", strerror(-ready));
		return ready;
	}
	if (rpc->unsent != NULL) {
		rc = spdk_jsonrpc_client_send_request(rpc->client, rpc->unsent);
		if (rc == 0) {
			rpc->unsent = NULL;
		} else if (rc != -ENOSPC) {
			spdk_jsonrpc_client_free_request(rpc->unsent);
			rpc->unsent = NULL;
			fill_message(message, "cannot send the RPC request: %s", strerror(-rc));
			return rc;
		}
	}
	if (ready == 0) {
		return 0;
	}
	response = spdk_jsonrpc_client_get_response(rpc->client);
	if (response == NULL) {
		return 0;
	}
	if (response->id == NULL || spdk_json_number_to_int32(response->id, &answered) != 0 || answered != id) {
		/* To a call that was given up. */
		spdk_jsonrpc_client_free_response(response);
		return 0;
	}
	rc = 1;
	if (response->error != NULL) {
		rc = -EINVAL;
		text = member(response->error, "message", SPDK_JSON_VAL_STRING);
		if (text != NULL) {
			fill_message(message, "%.*s", (int)spdk_min(text->len, GAUR_SPDK_MESSAGE - 1),
				     (const char *)text->start);
		} else {
			fill_message(message, "an error without a message");
		}
	}
	spdk_jsonrpc_client_free_response(response);
	return rc;
}

/* ---- block devices ----------------------------------------------------------------------------------------------- */

struct gaur_bdev {
	struct spdk_bdev_desc *desc;
	struct spdk_bdev *bdev;
	uint64_t num_blocks;
	bool claimed;
	/* It belongs to the NVMe driver's own bdev module. */
	bool is_nvme;
	uint32_t removed;
};

/* In whose name bdevs are claimed. Never registered: SPDK needs no more than its address and name for a claim. */
static struct spdk_bdev_module g_claimer = {
	.name = "gaur",
};

static void
bdev_event(enum spdk_bdev_event_type type, struct spdk_bdev *bdev, void *ctx)
{
	struct gaur_bdev *self = ctx;

	(void)bdev;
	if (type == SPDK_BDEV_EVENT_REMOVE) {
		__atomic_store_n(&self->removed, 1, __ATOMIC_RELEASE);
	}
}

int
gaur_bdev_open(const char *name, bool write, struct gaur_bdev **out)
{
	struct gaur_bdev *self;
	int rc;

	if (spdk_bdev_get_by_name(name) == NULL) {
		return -ENODEV;
	}
	self = calloc(1, sizeof(*self));
	if (self == NULL) {
		return -ENOMEM;
	}
	rc = spdk_bdev_open_ext(name, write, bdev_event, self, &self->desc);
	if (rc == 0) {
		self->bdev = spdk_bdev_desc_get_bdev(self->desc);
		self->num_blocks = spdk_bdev_get_num_blocks(self->bdev);
		self->is_nvme = strcmp(self->bdev->module->name, "nvme") == 0 &&
				spdk_bdev_io_type_supported(self->bdev, SPDK_BDEV_IO_TYPE_NVME_IO);
		if (write) {
			rc = spdk_bdev_module_claim_bdev(self->bdev, self->desc, &g_claimer);
			self->claimed = rc == 0;
		}
		if (rc != 0) {
			spdk_bdev_close(self->desc);
		}
	}
	if (rc != 0) {
		free(self);
		return rc == -EPERM ? -EBUSY : rc;
	}
	*out = self;
	return 0;
}

void
gaur_bdev_close(struct gaur_bdev *self)
{
	if (self->claimed) {
		spdk_bdev_module_release_bdev(self->bdev);
	}
	spdk_bdev_close(self->desc);
	free(self);
}

void
gaur_bdev_get_info(const struct gaur_bdev *self, struct gaur_bdev_info *out)
{
	struct spdk_bdev *bdev = self->bdev;

	memset(out, 0, sizeof(*out));
	out->num_blocks = self->num_blocks;
	out->block_size = spdk_bdev_get_block_size(bdev);
	out->buf_align = (uint32_t)spdk_bdev_get_buf_align(bdev);
	out->optimal_io_boundary = spdk_bdev_get_optimal_io_boundary(bdev);
	out->write_unit = spdk_bdev_get_write_unit_size(bdev);
	out->md_size = spdk_bdev_get_md_size(bdev);
	out->write_cache = spdk_bdev_has_write_cache(bdev);
	out->can_write = spdk_bdev_io_type_supported(bdev, SPDK_BDEV_IO_TYPE_WRITE);
	out->can_flush = spdk_bdev_io_type_supported(bdev, SPDK_BDEV_IO_TYPE_FLUSH);
	out->can_unmap = spdk_bdev_io_type_supported(bdev, SPDK_BDEV_IO_TYPE_UNMAP);
	out->can_write_zeroes = spdk_bdev_io_type_supported(bdev, SPDK_BDEV_IO_TYPE_WRITE_ZEROES);
	out->zoned = spdk_bdev_is_zoned(bdev);
	out->own_memory = self->is_nvme;
}

const char *
gaur_bdev_name(const struct gaur_bdev *self)
{
	return spdk_bdev_get_name(self->bdev);
}

struct spdk_bdev_desc *
gaur_bdev_desc(const struct gaur_bdev *self)
{
	return self->desc;
}

const uint32_t *
gaur_bdev_removed(const struct gaur_bdev *self)
{
	return &self->removed;
}

/* DPDK's, and not in a header of SPDK's. */
struct rte_mempool;
struct rte_mempool *rte_mempool_lookup(const char *name);
unsigned int rte_mempool_avail_count(const struct rte_mempool *pool);

bool
gaur_bdev_room_for_thread(void)
{
	struct spdk_bdev_opts opts;
	struct rte_mempool *pool;
	char name[32];

	memset(&opts, 0, sizeof(opts));
#ifdef GAUR_HAVE_BDEV_OPTS_SIZE
	spdk_bdev_get_opts(&opts, sizeof(opts));
#else
	spdk_bdev_get_opts(&opts);
#endif
	/* SPDK's name for its pool; if that changes, nothing is checked. */
	snprintf(name, sizeof(name), "bdev_io_%d", getpid());
	pool = rte_mempool_lookup(name);
	/* Twice as much as is needed: others take from it at the same time. */
	return pool == NULL || rte_mempool_avail_count(pool) >= 2 * opts.bdev_io_cache_size;
}

int
gaur_bdev_flush(const struct gaur_bdev *self, struct spdk_io_channel *channel,
		void (*done)(struct spdk_bdev_io *io, bool success, void *arg), void *arg)
{
	struct spdk_nvme_cmd flush;

	if (self->is_nvme) {
		memset(&flush, 0, sizeof(flush));
		flush.opc = SPDK_NVME_OPC_FLUSH;
		return spdk_bdev_nvme_io_passthru(self->desc, channel, &flush, NULL, 0, done, arg);
	}
	return spdk_bdev_flush_blocks(self->desc, channel, 0, self->num_blocks, done, arg);
}

void
gaur_bdev_names(void (*fn)(void *ctx, const char *name), void *ctx)
{
	struct spdk_bdev *bdev;

	for (bdev = spdk_bdev_first(); bdev != NULL; bdev = spdk_bdev_next(bdev)) {
		fn(ctx, spdk_bdev_get_name(bdev));
	}
}

void
gaur_bdev_io_error(struct spdk_bdev_io *io, struct gaur_io_error *out)
{
	uint32_t cdw0;
	int sct = 0, sc = 0;

	memset(out, 0, sizeof(*out));
	switch (io->internal.status) {
	case SPDK_BDEV_IO_STATUS_NVME_ERROR:
		spdk_bdev_io_get_nvme_status(io, &cdw0, &sct, &sc);
		out->kind = GAUR_IO_NVME;
		out->sct = (uint8_t)sct;
		out->sc = (uint8_t)sc;
		break;
	case SPDK_BDEV_IO_STATUS_NOMEM:
		out->kind = GAUR_IO_NOMEM;
		break;
#ifdef GAUR_HAVE_STATUS_ABORTED
	case SPDK_BDEV_IO_STATUS_ABORTED:
		out->kind = GAUR_IO_ABORTED;
		break;
#endif
#ifdef GAUR_HAVE_AIO_STATUS
	case SPDK_BDEV_IO_STATUS_AIO_ERROR: {
		int error = 0;

		spdk_bdev_io_get_aio_status(io, &error);
		out->kind = GAUR_IO_ERRNO;
		out->error = error < 0 ? -error : error;
		break;
	}
#endif
	default:
		out->kind = GAUR_IO_FAILED;
		break;
	}
}
