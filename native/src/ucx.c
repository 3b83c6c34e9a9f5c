/* Messages over UCX without Python in the loop: see ucx.h. The declarations are those of UCX's stable ABI, ucp/api/ucp.h. */
#define _POSIX_C_SOURCE 199309L /* clock_gettime */
#include "ucx.h"

#include <sched.h>
#include <stdbool.h>
#include <time.h>

#define IN_PROGRESS 1
#define LAST_ERROR (-100) /* UCS_ERR_LAST */
#define YIELD 8 /* rounds without anything, after which whoever else wants this core gets it: it may be the peer */
#define ROUNDS 16 /* of progress, each of which may be a piece of a few KiB, between looks at messages and the clock */

typedef int8_t ucs_status; /* a packed enum */

typedef struct {
    uint64_t sender_tag;
    size_t length;
} ucp_tag_recv_info;

typedef void send_callback(void *request, ucs_status status, void *user_data);
typedef void receive_callback(void *request, ucs_status status, const ucp_tag_recv_info *info, void *user_data);

/* As far as it is used: op_attr_mask says which fields are. */
typedef struct {
    uint32_t op_attr_mask;
    uint32_t flags;
    void *request;
    union {
        send_callback *send;
        receive_callback *receive;
    } callback;
    uint64_t datatype;
    void *user_data;
    void *reply_buffer;
    int memory_type;
    void *recv_info;
    void *memh;
} ucp_request_param;

enum { FIELD_CALLBACK = 1 << 1, FIELD_USER_DATA = 1 << 2, FIELD_FLAGS = 1 << 4, FIELD_MEMORY_TYPE = 1 << 6 };
enum { CLOSE_FORCE = 1, HOST_MEMORY = 0 };

typedef unsigned progress_function(void *worker);
typedef void *probe_function(void *worker, uint64_t tag, uint64_t mask, int remove, ucp_tag_recv_info *info);
typedef void *receive_function(void *worker, void *data, size_t count, void *message, const ucp_request_param *param);
typedef void *send_function(void *endpoint, const void *data, size_t count, uint64_t tag, const ucp_request_param *param);
typedef void free_function(void *request);
typedef void *close_function(void *endpoint, const ucp_request_param *param);

/* One of its messages is over, or no more will follow. */
static void over(lynx_ucx_operation *operation, int status) {
    if (status != 0 && operation->failed == 0)
        operation->failed = status;
    if (--operation->left == 0)
        operation->status = operation->failed;
}

static void completed(lynx_ucx_operation *operation, void *request, ucs_status status) {
    over(operation, status);
    ((free_function *)operation->ucx->ucp_request_free)(request);
}

/* UCX calls these from progress, never from the call that begins the operation. */
static void sent(void *request, ucs_status status, void *operation) {
    completed(operation, request, status);
}

static void received(void *request, ucs_status status, const ucp_tag_recv_info *info, void *operation) {
    (void)info;
    completed(operation, request, status);
}

static void begin(const lynx_ucx *ucx, lynx_ucx_operation *operation) {
    *operation = (lynx_ucx_operation){.status = IN_PROGRESS, .left = 1, .ucx = ucx};
}

/* What a call returned: NULL, over; an error; or a request, which has a callback. */
static void settle(lynx_ucx_operation *operation, void *result) {
    if (result == NULL)
        over(operation, 0);
    else if ((uintptr_t)result >= (uintptr_t)LAST_ERROR)
        over(operation, (int)(intptr_t)result);
}

static void send_one(const lynx_ucx *ucx, void *endpoint, const void *data, size_t nbytes, uint64_t tag,
    lynx_ucx_operation *operation) {
    const ucp_request_param param = {
        .op_attr_mask = FIELD_CALLBACK | FIELD_USER_DATA | FIELD_MEMORY_TYPE,
        .callback.send = sent,
        .user_data = operation,
        .memory_type = HOST_MEMORY,
    };
    operation->left++;
    operation->nbytes += nbytes;
    settle(operation, ((send_function *)ucx->ucp_tag_send_nbx)(endpoint, data, nbytes, tag, &param));
}

static void receive_one(
    const lynx_ucx *ucx, void *message, void *data, size_t nbytes, lynx_ucx_operation *operation) {
    const ucp_request_param param = {
        .op_attr_mask = FIELD_CALLBACK | FIELD_USER_DATA | FIELD_MEMORY_TYPE,
        .callback.receive = received,
        .user_data = operation,
        .memory_type = HOST_MEMORY,
    };
    operation->left++;
    operation->nbytes += nbytes;
    settle(operation, ((receive_function *)ucx->ucp_tag_msg_recv_nbx)(ucx->worker, data, nbytes, message, &param));
}

void lynx_ucx_send(
    const lynx_ucx *ucx, void *endpoint, const void *data, size_t nbytes, uint64_t tag, lynx_ucx_operation *operation) {
    begin(ucx, operation);
    send_one(ucx, endpoint, data, nbytes, tag, operation);
    over(operation, 0);
}

void lynx_ucx_receive(const lynx_ucx *ucx, void *message, void *data, size_t nbytes, lynx_ucx_operation *operation) {
    begin(ucx, operation);
    receive_one(ucx, message, data, nbytes, operation);
    over(operation, 0);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Messages with this tag and at most so many bytes are received into `data` one after the other. */
typedef struct {
    uint64_t tag;
    uint8_t *data;
    size_t most;
    size_t piece;
    size_t enough;
} expectation;

/* Whether a message of `nbytes` is received by the operation that is to receive what is `expected`. */
static bool wanted(const expectation *expected, const lynx_ucx_operation *operation, uint64_t tag, size_t nbytes) {
    if (tag != expected->tag || nbytes == 0 || nbytes > expected->piece || nbytes > expected->most - operation->nbytes)
        return false;
    return operation->nbytes == 0 || nbytes >= expected->enough;
}

/* `expected`, or NULL: what becomes the operation. */
static int poll_for(lynx_ucx *ucx, lynx_ucx_operation *operation, const expectation *expected) {
    progress_function *const progress = (progress_function *)ucx->ucp_worker_progress;
    probe_function *const probe = (probe_function *)ucx->ucp_tag_probe_nb;
    const size_t open = expected != NULL; /* what is left when all that has begun is over */
    uint64_t began = 0, moved = 0;
    unsigned idle = 0;
    for (;;) {
        int rounds = 0;
        while (progress(ucx->worker) && ++rounds < ROUNDS)
            if (operation != NULL && operation->left == open && operation->nbytes > 0)
                break;
        ucp_tag_recv_info info;
        /* Once nothing more fits, what has come next waits for the next call, which can name its place at once. */
        const bool full = expected != NULL && operation->nbytes > 0 && expected->most - operation->nbytes < expected->enough;
        void *const message = full ? NULL : probe(ucx->worker, 0, 0, 1, &info);
        if (message != NULL) {
            if (expected == NULL || !wanted(expected, operation, info.sender_tag, info.length)) {
                ucx->found = (lynx_ucx_message){.handle = message, .tag = info.sender_tag, .nbytes = info.length};
                return LYNX_UCX_FOUND;
            }
            receive_one(ucx, message, expected->data + operation->nbytes, info.length, operation);
            if (info.length >= expected->enough)
                continue; /* the next one may have come too */
        }
        if (operation != NULL && operation->left == open && (expected == NULL || operation->nbytes > 0))
            return LYNX_UCX_OVER;
        if (ucx->quiet_ns == 0 && rounds == 0)
            return LYNX_UCX_QUIET;
        const uint64_t now = now_ns();
        if (began == 0)
            began = moved = now;
        if (rounds)
            moved = now;
        else if (now - moved >= ucx->quiet_ns)
            return LYNX_UCX_QUIET;
        if (now - began >= ucx->most_ns)
            return LYNX_UCX_BUSY;
        if (rounds == 0 && ++idle % YIELD == 0)
            sched_yield();
    }
}

int lynx_ucx_poll(lynx_ucx *ucx, lynx_ucx_operation *operation) {
    return poll_for(ucx, operation, NULL);
}

int lynx_ucx_send_poll(lynx_ucx *ucx, void *endpoint, const void *data, size_t nbytes, size_t piece, uint64_t tag,
    lynx_ucx_operation *operation) {
    begin(ucx, operation);
    for (size_t there = 0; there < nbytes; there += piece)
        send_one(ucx, endpoint, (const uint8_t *)data + there, nbytes - there < piece ? nbytes - there : piece, tag,
            operation);
    over(operation, 0);
    return poll_for(ucx, operation, NULL);
}

int lynx_ucx_receive_poll(lynx_ucx *ucx, uint64_t tag, void *data, size_t most, size_t piece, size_t enough,
    lynx_ucx_operation *operation) {
    const expectation expected = {.tag = tag, .data = data, .most = most, .piece = piece, .enough = enough};
    begin(ucx, operation);
    const int outcome = poll_for(ucx, operation, &expected);
    over(operation, 0);
    return outcome;
}

void lynx_ucx_close_endpoint(const lynx_ucx *ucx, void *endpoint, lynx_ucx_operation *operation) {
    const ucp_request_param param = {
        .op_attr_mask = FIELD_CALLBACK | FIELD_USER_DATA | FIELD_FLAGS,
        .flags = CLOSE_FORCE,
        .callback.send = sent,
        .user_data = operation,
    };
    begin(ucx, operation);
    operation->left++;
    settle(operation, ((close_function *)ucx->ucp_ep_close_nbx)(endpoint, &param));
    over(operation, 0);
}
