/* Messages over UCX without Python in the loop: see ucx.h. The declarations are those of UCX's stable ABI, ucp/api/ucp.h. */
#define _POSIX_C_SOURCE 199309L /* clock_gettime */
#include "ucx.h"

#include <time.h>

#define IN_PROGRESS 1
#define LAST_ERROR (-100) /* UCS_ERR_LAST */
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

static void over(lynx_ucx_operation *operation, void *request, ucs_status status) {
    operation->status = status;
    ((free_function *)operation->ucx->ucp_request_free)(request);
}

/* UCX calls these from progress, never from the call that begins the operation. */
static void sent(void *request, ucs_status status, void *operation) {
    over(operation, request, status);
}

static void received(void *request, ucs_status status, const ucp_tag_recv_info *info, void *operation) {
    (void)info;
    over(operation, request, status);
}

static void begin(const lynx_ucx *ucx, size_t nbytes, lynx_ucx_operation *operation) {
    *operation = (lynx_ucx_operation){.status = IN_PROGRESS, .nbytes = nbytes, .ucx = ucx};
}

/* What a call returned: NULL, over; an error; or a request, which has a callback. */
static void settle(lynx_ucx_operation *operation, void *result) {
    if (result == NULL)
        operation->status = 0;
    else if ((uintptr_t)result >= (uintptr_t)LAST_ERROR)
        operation->status = (int)(intptr_t)result;
}

void lynx_ucx_send(
    const lynx_ucx *ucx, void *endpoint, const void *data, size_t nbytes, uint64_t tag, lynx_ucx_operation *operation) {
    const ucp_request_param param = {
        .op_attr_mask = FIELD_CALLBACK | FIELD_USER_DATA | FIELD_MEMORY_TYPE,
        .callback.send = sent,
        .user_data = operation,
        .memory_type = HOST_MEMORY,
    };
    begin(ucx, nbytes, operation);
    settle(operation, ((send_function *)ucx->ucp_tag_send_nbx)(endpoint, data, nbytes, tag, &param));
}

void lynx_ucx_receive(const lynx_ucx *ucx, void *message, void *data, size_t nbytes, lynx_ucx_operation *operation) {
    const ucp_request_param param = {
        .op_attr_mask = FIELD_CALLBACK | FIELD_USER_DATA | FIELD_MEMORY_TYPE,
        .callback.receive = received,
        .user_data = operation,
        .memory_type = HOST_MEMORY,
    };
    begin(ucx, nbytes, operation);
    settle(operation, ((receive_function *)ucx->ucp_tag_msg_recv_nbx)(ucx->worker, data, nbytes, message, &param));
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* `expected`: a message with this tag and at most so many bytes is received into `data` by `operation`; NULL: none is. */
typedef struct {
    uint64_t tag;
    void *data;
    size_t most;
} expectation;

static int poll_for(lynx_ucx *ucx, lynx_ucx_operation *operation, const expectation *expected) {
    progress_function *const progress = (progress_function *)ucx->ucp_worker_progress;
    probe_function *const probe = (probe_function *)ucx->ucp_tag_probe_nb;
    uint64_t began = 0, moved = 0;
    for (;;) {
        int rounds = 0;
        while (progress(ucx->worker) && ++rounds < ROUNDS)
            if (expected == NULL && operation != NULL && operation->status != IN_PROGRESS)
                break;
        ucp_tag_recv_info info;
        void *const message = probe(ucx->worker, 0, 0, 1, &info);
        if (message != NULL) {
            if (expected == NULL || info.sender_tag != expected->tag || info.length - 1 >= expected->most) {
                ucx->found = (lynx_ucx_message){.handle = message, .tag = info.sender_tag, .nbytes = info.length};
                return LYNX_UCX_FOUND;
            }
            lynx_ucx_receive(ucx, message, expected->data, info.length, operation);
            expected = NULL;
        }
        if (expected == NULL && operation != NULL && operation->status != IN_PROGRESS)
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
    }
}

int lynx_ucx_poll(lynx_ucx *ucx, lynx_ucx_operation *operation) {
    return poll_for(ucx, operation, NULL);
}

int lynx_ucx_send_poll(
    lynx_ucx *ucx, void *endpoint, const void *data, size_t nbytes, uint64_t tag, lynx_ucx_operation *operation) {
    lynx_ucx_send(ucx, endpoint, data, nbytes, tag, operation);
    return poll_for(ucx, operation, NULL);
}

int lynx_ucx_receive_poll(lynx_ucx *ucx, uint64_t tag, void *data, size_t most, lynx_ucx_operation *operation) {
    const expectation expected = {.tag = tag, .data = data, .most = most};
    operation->nbytes = 0;
    return poll_for(ucx, operation, &expected);
}

void lynx_ucx_close_endpoint(const lynx_ucx *ucx, void *endpoint, lynx_ucx_operation *operation) {
    const ucp_request_param param = {
        .op_attr_mask = FIELD_CALLBACK | FIELD_USER_DATA | FIELD_FLAGS,
        .flags = CLOSE_FORCE,
        .callback.send = sent,
        .user_data = operation,
    };
    begin(ucx, 0, operation);
    settle(operation, ((close_function *)ucx->ucp_ep_close_nbx)(endpoint, &param));
}
