/* Messages over UCX without Python in the loop: see ucx.h. The declarations are those of UCX's stable ABI, ucp/api/ucp.h. */
#define _POSIX_C_SOURCE 199309L /* clock_gettime */
#include "ucx.h"

#include <sched.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define IN_PROGRESS 1
#define CANCELED (-16) /* UCS_ERR_CANCELED */
#define LAST_ERROR (-100) /* UCS_ERR_LAST */
#define YIELD 256 /* rounds without anything, some 20 us, after which whoever else wants this core gets it: it may be the peer */
#define AGAIN 32 /* rounds until it gets it again */
#define CLOCK 16 /* rounds with something, in which nobody looks at the clock */
#define LANES 16 /* of an endpoint, at most */
#define LINGER_NS 20000 /* without anything, after which a receiver of messages takes what it has */

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

enum {
    FIELD_CALLBACK = 1 << 1,
    FIELD_USER_DATA = 1 << 2,
    FIELD_FLAGS = 1 << 4,
    FIELD_MEMORY_TYPE = 1 << 6,
    FIELD_RECV_INFO = 1 << 7,
};
enum { CLOSE_FORCE = 1, HOST_MEMORY = 0 };

/* ucp_ep_attr_t; the addresses, which nobody asks for here, are as large as sockaddr_storage. */
typedef struct {
    const char *transport_name;
    const char *device_name;
} ucp_transport_entry;

typedef struct {
    uint64_t field_mask;
    char name[32];
    struct {
        uint64_t words[16];
    } local_sockaddr, remote_sockaddr;
    struct {
        ucp_transport_entry *entries;
        unsigned num_entries;
        size_t entry_size;
    } transports;
    void *user_data;
} ucp_ep_attr;

enum { FIELD_TRANSPORTS = 1 << 3 };

typedef ucs_status query_function(void *endpoint, ucp_ep_attr *attributes);
typedef unsigned progress_function(void *worker);
typedef void *probe_function(void *worker, uint64_t tag, uint64_t mask, int remove, ucp_tag_recv_info *info);
typedef void *post_function(
    void *worker, void *data, size_t count, uint64_t tag, uint64_t mask, const ucp_request_param *param);
typedef void cancel_function(void *worker, void *request);
typedef void *receive_function(void *worker, void *data, size_t count, void *message, const ucp_request_param *param);
typedef void *send_function(void *endpoint, const void *data, size_t count, uint64_t tag, const ucp_request_param *param);
typedef void free_function(void *request);
typedef void *close_function(void *endpoint, const ucp_request_param *param);

static size_t smaller(size_t one, size_t other) {
    return one < other ? one : other;
}

/* One message more is under way. */
static void under_way(lynx_ucx_operation *operation) {
    operation->left++;
    operation->status = IN_PROGRESS;
}

/* One of them is over. */
static void over(lynx_ucx_operation *operation, int status) {
    if (status != 0 && operation->failed == 0)
        operation->failed = status;
    if (--operation->left == 0)
        operation->status = operation->failed;
}

static void completed(lynx_ucx_operation *operation, void *request, ucs_status status) {
    over(operation, status);
    ((free_function *)operation->ucp_request_free)(request);
}

/* UCX calls these from progress, never from the call that begins the operation. */
static void sent(void *request, ucs_status status, void *operation) {
    completed(operation, request, status);
}

static void received(void *request, ucs_status status, const ucp_tag_recv_info *info, void *operation) {
    (void)info;
    completed(operation, request, status);
}

void lynx_ucx_begin(const lynx_ucx *ucx, lynx_ucx_operation *operation) {
    *operation = (lynx_ucx_operation){.ucp_request_free = ucx->ucp_request_free};
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
    under_way(operation);
    operation->messages++;
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
    under_way(operation);
    operation->messages++;
    operation->nbytes += nbytes;
    settle(operation, ((receive_function *)ucx->ucp_tag_msg_recv_nbx)(ucx->worker, data, nbytes, message, &param));
}

int lynx_ucx_transports(const lynx_ucx *ucx, void *endpoint, const char **names, int most) {
    ucp_transport_entry entries[LANES];
    ucp_ep_attr attributes = {
        .field_mask = FIELD_TRANSPORTS,
        .transports = {.entries = entries, .num_entries = LANES, .entry_size = sizeof entries[0]},
    };
    const ucs_status status = ((query_function *)ucx->ucp_ep_query)(endpoint, &attributes);
    if (status != 0)
        return status;
    const int found = (int)smaller(attributes.transports.num_entries, (size_t)most);
    for (int lane = 0; lane < found; lane++)
        names[lane] = entries[lane].transport_name;
    return found;
}

/* All at once: UCX keeps those that the device does not take yet. */
void lynx_ucx_send(const lynx_ucx *ucx, lynx_ucx_stream *stream, const void *data, size_t nbytes, lynx_ucx_operation *operation) {
    const uint8_t *from = data;
    while (nbytes) {
        const size_t piece = smaller(nbytes, stream->longest && nbytes >= stream->enough ? stream->longest : stream->shortest);
        stream->unconfirmed += piece + LYNX_UCX_COST;
        send_one(ucx, stream->endpoint, from, piece, stream->theirs | LYNX_UCX_DATA, operation);
        from += piece;
        nbytes -= piece;
    }
}

void lynx_ucx_tell(const lynx_ucx *ucx, const lynx_ucx_stream *stream, int kind, lynx_ucx_operation *operation) {
    lynx_ucx_begin(ucx, operation);
    send_one(ucx, stream->endpoint, NULL, 0, stream->theirs | (uint64_t)kind, operation);
}

void lynx_ucx_receive(const lynx_ucx *ucx, void *message, void *data, size_t nbytes, lynx_ucx_operation *operation) {
    lynx_ucx_begin(ucx, operation);
    receive_one(ucx, message, data, nbytes, operation);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void lynx_ucx_open_stream(lynx_ucx *ucx, lynx_ucx_stream *stream) {
    stream->next = ucx->streams;
    ucx->streams = stream;
    ucx->dropped.ucp_request_free = ucx->ucp_request_free;
}

void lynx_ucx_close_stream(lynx_ucx *ucx, lynx_ucx_stream *stream) {
    lynx_ucx_stream **at = &ucx->streams;
    while (*at != NULL && *at != stream)
        at = &(*at)->next;
    if (*at != NULL)
        *at = stream->next;
    free(stream->inbox);
    stream->inbox = NULL;
    stream->room = stream->count = 0;
}

/* The stream that is sent to most, as far as the last messages tell, is found first. */
static lynx_ucx_stream *stream_of(lynx_ucx *ucx, uint64_t tag) {
    const uint64_t mine = tag & ~(uint64_t)LYNX_UCX_KIND;
    for (lynx_ucx_stream **at = &ucx->streams; *at != NULL; at = &(*at)->next) {
        lynx_ucx_stream *const stream = *at;
        if (stream->mine == mine) {
            *at = stream->next;
            stream->next = ucx->streams;
            ucx->streams = stream;
            return stream;
        }
    }
    return NULL;
}

static bool put(lynx_ucx_stream *stream, const lynx_ucx_message *message) {
    if (stream->held + message->nbytes + LYNX_UCX_COST > LYNX_UCX_WINDOW)
        return false;
    if (stream->count == stream->room) {
        const size_t room = stream->room ? 2 * stream->room : 64;
        lynx_ucx_message *const inbox = malloc(room * sizeof *inbox);
        if (inbox == NULL)
            return false;
        for (size_t i = 0; i < stream->count; i++)
            inbox[i] = stream->inbox[(stream->first + i) % stream->room];
        free(stream->inbox);
        stream->inbox = inbox;
        stream->room = room;
        stream->first = 0;
    }
    stream->inbox[(stream->first + stream->count++) % stream->room] = *message;
    stream->held += message->nbytes + LYNX_UCX_COST;
    return true;
}

static lynx_ucx_message take(lynx_ucx_stream *stream) {
    const lynx_ucx_message message = stream->inbox[stream->first];
    stream->first = (stream->first + 1) % stream->room;
    stream->count--;
    stream->held -= message.nbytes + LYNX_UCX_COST;
    return message;
}

int lynx_ucx_take(lynx_ucx *ucx, lynx_ucx_stream *stream) {
    if (stream->count == 0)
        return 0;
    ucx->found = take(stream);
    return 1;
}

/* To its stream, if that is all; whether the caller has to see `found`. */
static bool deliver(lynx_ucx *ucx, const lynx_ucx_message *message) {
    lynx_ucx_stream *const stream = stream_of(ucx, message->tag);
    const uint64_t kind = message->tag & LYNX_UCX_KIND;
    ucx->found = (lynx_ucx_message){.handle = NULL, .tag = message->tag};
    if (stream != NULL && kind == LYNX_UCX_DATA && message->nbytes > 0 && message->nbytes <= LYNX_UCX_PIECE
        && put(stream, message))
        return stream->receiver_waits;
    if (stream != NULL && kind == LYNX_UCX_CONFIRM && message->nbytes == 0 && stream->unconfirmed >= LYNX_UCX_CONFIRMED) {
        stream->unconfirmed -= LYNX_UCX_CONFIRMED;
        receive_one(ucx, message->handle, NULL, 0, &ucx->dropped);
        return stream->sender_waits;
    }
    ucx->found = *message;
    return true;
}

/* Where a stream's messages go, one after the other, instead of its inbox. */
typedef struct {
    lynx_ucx_stream *stream;
    size_t most;
} destination;

/* More messages are to be expected, and there is room. */
static bool more(const destination *to, const lynx_ucx_operation *operation) {
    return !operation->ended && operation->nbytes < to->most;
}

/* A message that was found, if there is room for it. */
static bool place(const lynx_ucx *ucx, const destination *to, const lynx_ucx_message *message, lynx_ucx_operation *operation) {
    if (message->nbytes > to->most - operation->nbytes) {
        operation->ended = 1;
        return false;
    }
    receive_one(ucx, message->handle, operation->data + operation->nbytes, message->nbytes, operation);
    operation->ended = message->nbytes < operation->whole;
    return true;
}

/* What came for a place. They come in order; behind one that is shorter than its place all move up. */
static void land(lynx_ucx_place *at, int status, size_t nbytes) {
    lynx_ucx_operation *const operation = at->operation;
    at->request = NULL;
    at->nbytes = status == 0 ? nbytes : 0;
    for (; operation->count && operation->places[operation->first].request == NULL; operation->count--) {
        const lynx_ucx_place *const next = &operation->places[operation->first];
        operation->first = (operation->first + 1) % LYNX_UCX_AHEAD;
        uint8_t *const end = operation->data + operation->nbytes;
        if (next->data != end)
            memmove(end, next->data, next->nbytes);
        operation->nbytes += next->nbytes;
        operation->messages += next->nbytes > 0;
        if (next->nbytes < operation->whole)
            operation->ended = 1;
    }
    if (status == 0 && nbytes == 0)
        status = LYNX_UCX_REFUSED;
    over(operation, status == CANCELED ? 0 : status);
}

static void landed(void *request, ucs_status status, const ucp_tag_recv_info *info, void *user_data) {
    lynx_ucx_place *const at = user_data;
    at->operation->awaited--;
    const uintptr_t ucp_request_free = at->operation->ucp_request_free;
    land(at, status, info->length);
    ((free_function *)ucp_request_free)(request);
}

/* Names the places of the next messages before they come, if whatever the peer may send as one packet fits: UCX then copies
 * them but once, many in a round. Returns how many had come already. */
static unsigned post(const lynx_ucx *ucx, const destination *to, lynx_ucx_operation *operation) {
    const size_t nbytes = to->stream->shortest;
    unsigned there = 0;
    while (to->stream->longest == 0 && more(to, operation) && operation->count < LYNX_UCX_AHEAD) {
        const unsigned last = (operation->first + operation->count - 1) % LYNX_UCX_AHEAD;
        uint8_t *const data = operation->count ? operation->places[last].data + nbytes : operation->data + operation->nbytes;
        if (nbytes > to->most - (size_t)(data - operation->data))
            break;
        lynx_ucx_place *const at = &operation->places[(operation->first + operation->count++) % LYNX_UCX_AHEAD];
        *at = (lynx_ucx_place){.operation = operation, .data = data};
        ucp_tag_recv_info info;
        const ucp_request_param param = {
            .op_attr_mask = FIELD_CALLBACK | FIELD_USER_DATA | FIELD_MEMORY_TYPE | FIELD_RECV_INFO,
            .callback.receive = landed,
            .user_data = at,
            .memory_type = HOST_MEMORY,
            .recv_info = &info,
        };
        under_way(operation);
        void *const result = ((post_function *)ucx->ucp_tag_recv_nbx)(
            ucx->worker, data, nbytes, to->stream->mine | LYNX_UCX_DATA, ~(uint64_t)0, &param);
        if (result != NULL && (uintptr_t)result < (uintptr_t)LAST_ERROR) {
            at->request = result;
            operation->awaited++;
            continue;
        }
        land(at, (int)(intptr_t)result, result == NULL ? info.length : 0);
        there++;
    }
    return there;
}

/* The places for which nothing came are nobody's any more. */
static void unpost(const lynx_ucx *ucx, lynx_ucx_operation *operation) {
    void *requests[LYNX_UCX_AHEAD];
    unsigned count = 0;
    operation->ended = 1;
    for (unsigned i = 0; i < operation->count; i++) {
        void *const request = operation->places[(operation->first + i) % LYNX_UCX_AHEAD].request;
        if (request != NULL)
            requests[count++] = request;
    }
    for (unsigned i = 0; i < count; i++)
        ((cancel_function *)ucx->ucp_request_cancel)(ucx->worker, requests[i]);
}

void lynx_ucx_confirm(lynx_ucx *ucx, lynx_ucx_stream *stream, lynx_ucx_operation *operation) {
    const size_t cost = operation->nbytes + operation->messages * LYNX_UCX_COST;
    stream->unsaid += cost - operation->counted;
    operation->counted = cost;
    while (stream->unsaid >= LYNX_UCX_CONFIRMED && stream->endpoint != NULL) {
        stream->unsaid -= LYNX_UCX_CONFIRMED;
        send_one(ucx, stream->endpoint, NULL, 0, stream->theirs | LYNX_UCX_CONFIRM, &ucx->dropped);
    }
}

/* `to`, or NULL: where what comes goes, as `operation`, which has not begun or has nothing yet. */
static int poll_for(lynx_ucx *ucx, lynx_ucx_operation *operation, const destination *to) {
    progress_function *const progress = (progress_function *)ucx->ucp_worker_progress;
    probe_function *const probe = (probe_function *)ucx->ucp_tag_probe_nb;
    uint64_t began = 0, moved = 0;
    unsigned idle = 0, busy = 0;
    for (;;) {
        unsigned rounds = to != NULL ? post(ucx, to, operation) : 0;
        rounds += progress(ucx->worker);
        while (to == NULL || more(to, operation)) { /* what comes later is the next call's */
            if (to != NULL)
                rounds += post(ucx, to, operation);
            ucp_tag_recv_info info;
            void *const handle = probe(ucx->worker, 0, 0, 1, &info);
            if (handle == NULL)
                break;
            rounds++;
            const lynx_ucx_message message = {.handle = handle, .tag = info.sender_tag, .nbytes = info.length};
            if (to != NULL && message.tag == (to->stream->mine | LYNX_UCX_DATA) && message.nbytes > 0
                && message.nbytes <= LYNX_UCX_PIECE && operation->count == 0 && place(ucx, to, &message, operation))
                continue;
            if (deliver(ucx, &message))
                return LYNX_UCX_FOUND;
        }
        const bool ready = operation != NULL && operation->left == (to != NULL ? operation->awaited : 0);
        if (ready && to != NULL)
            lynx_ucx_confirm(ucx, to->stream, operation);
        if (ready && (to == NULL || !more(to, operation)))
            return to != NULL && operation->nbytes == 0 && operation->failed == 0 ? LYNX_UCX_LONG : LYNX_UCX_OVER;
        const bool some = to != NULL && ready && operation->nbytes > 0;
        if (ucx->quiet_ns == 0 && rounds == 0)
            return some ? LYNX_UCX_OVER : LYNX_UCX_QUIET;
        if (rounds && ++busy % CLOCK)
            continue;
        const uint64_t now = now_ns();
        if (began == 0)
            began = moved = now;
        if (busy) {
            busy = idle = 0;
            moved = now;
        } else if (some && now - moved >= LINGER_NS)
            return LYNX_UCX_OVER;
        else if (now - moved >= ucx->quiet_ns)
            return LYNX_UCX_QUIET;
        if (now - began >= ucx->most_ns)
            return some ? LYNX_UCX_OVER : LYNX_UCX_BUSY;
        if (++idle >= YIELD && idle % AGAIN == 0)
            sched_yield();
    }
}

int lynx_ucx_poll(lynx_ucx *ucx, lynx_ucx_operation *operation) {
    return poll_for(ucx, operation, NULL);
}

int lynx_ucx_send_poll(lynx_ucx *ucx, lynx_ucx_stream *stream, const void *data, size_t nbytes, lynx_ucx_operation *operation) {
    lynx_ucx_begin(ucx, operation);
    lynx_ucx_send(ucx, stream, data, nbytes, operation);
    return operation->left ? poll_for(ucx, operation, NULL) : LYNX_UCX_OVER;
}

int lynx_ucx_receive_poll(lynx_ucx *ucx, lynx_ucx_stream *stream, void *data, size_t most, lynx_ucx_operation *operation) {
    const destination to = {.stream = stream, .most = most};
    lynx_ucx_begin(ucx, operation);
    operation->data = data;
    operation->whole = stream->shortest;
    while (more(&to, operation) && stream->count && place(ucx, &to, &stream->inbox[stream->first], operation))
        take(stream);
    const int outcome = operation->ended && operation->nbytes == 0 ? LYNX_UCX_LONG : poll_for(ucx, operation, &to);
    unpost(ucx, operation);
    if (operation->left == 0)
        lynx_ucx_confirm(ucx, stream, operation);
    return outcome;
}

void lynx_ucx_close_endpoint(const lynx_ucx *ucx, void *endpoint, lynx_ucx_operation *operation) {
    const ucp_request_param param = {
        .op_attr_mask = FIELD_CALLBACK | FIELD_USER_DATA | FIELD_FLAGS,
        .flags = CLOSE_FORCE,
        .callback.send = sent,
        .user_data = operation,
    };
    lynx_ucx_begin(ucx, operation);
    under_way(operation);
    settle(operation, ((close_function *)ucx->ucp_ep_close_nbx)(endpoint, &param));
}
