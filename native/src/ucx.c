/* Messages over UCX without Python in the loop: see ucx.h. The declarations are those of UCX's stable ABI, ucp/api/ucp.h. */
#define _POSIX_C_SOURCE 199309L /* clock_gettime */
#include "ucx.h"

#include <sched.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define IN_PROGRESS 1
#define LAST_ERROR (-100) /* UCS_ERR_LAST */
#define HANDLER 0 /* the id of the one handler; it takes the place of ucxx's, which allocates what a peer announces */
#define CLOCK 16 /* rounds with something, in which nobody looks at the clock */
#define LANES 16 /* of an endpoint, at most */
#define YIELD_NS 20000 /* without anything, after which whoever else wants this core gets it, once: it may be the peer */
#define LINGER_NS 20000 /* without anything, after which a receiver of messages takes what it has */

typedef int8_t ucs_status; /* a packed enum */

typedef struct {
    uint64_t attributes;
    void *reply_endpoint;
} ucp_am_recv_param;

typedef ucs_status message_handler(
    void *arg, const void *header, size_t header_nbytes, void *data, size_t nbytes, const ucp_am_recv_param *param);
typedef void send_callback(void *request, ucs_status status, void *user_data);
typedef void receive_callback(void *request, ucs_status status, size_t nbytes, void *user_data);

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
};
enum { CLOSE_FORCE = 1, HOST_MEMORY = 0 };
enum { SEND_EAGER = 1 << 1, SEND_RENDEZVOUS = 1 << 2, SEND_COPY_HEADER = 1 << 3 };
enum { RECEIVED_DATA = 1 << 16, RECEIVED_RENDEZVOUS = 1 << 17 };

typedef struct {
    uint64_t field_mask;
    unsigned id;
    uint32_t flags;
    message_handler *handler;
    void *arg;
} ucp_am_handler_param;

enum { HANDLER_ID = 1 << 0, HANDLER_FUNCTION = 1 << 2, HANDLER_ARG = 1 << 3 };

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
typedef ucs_status handler_function(void *worker, const ucp_am_handler_param *param);
typedef unsigned progress_function(void *worker);
typedef void *receive_function(void *worker, void *message, void *data, size_t count, const ucp_request_param *param);
typedef void *send_function(void *endpoint, unsigned id, const void *header, size_t header_nbytes, const void *data,
    size_t count, const ucp_request_param *param);
typedef void release_function(void *worker, void *data);
typedef void free_function(void *request);
typedef void *close_function(void *endpoint, const ucp_request_param *param);

/* Of every message. */
typedef struct {
    uint64_t tag;
    uint64_t number; /* of those that carry the stream: its bytes, its end */
} message_header;

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

/* UCX calls these from progress, never from the call that begins the operation. */
static void sent(void *request, ucs_status status, void *user_data) {
    lynx_ucx_operation *const operation = user_data;
    over(operation, status);
    ((free_function *)operation->ucp_request_free)(request);
}

static void received(void *request, ucs_status status, size_t nbytes, void *operation) {
    (void)nbytes;
    sent(request, status, operation);
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

static void send_one(const lynx_ucx *ucx, lynx_ucx_stream *stream, int kind, const void *data, size_t nbytes, int how,
    lynx_ucx_operation *operation) {
    const message_header header = {
        .tag = stream->theirs | (uint64_t)kind, .number = kind == LYNX_UCX_CONFIRM ? 0 : stream->sent++};
    const ucp_request_param param = {
        .op_attr_mask = FIELD_CALLBACK | FIELD_USER_DATA | FIELD_FLAGS | FIELD_MEMORY_TYPE,
        .flags = (uint32_t)(how | SEND_COPY_HEADER),
        .callback.send = sent,
        .user_data = operation,
        .memory_type = HOST_MEMORY,
    };
    under_way(operation);
    operation->messages++;
    operation->nbytes += nbytes;
    settle(operation,
        ((send_function *)ucx->ucp_am_send_nbx)(
            stream->endpoint, HANDLER, &header, sizeof header, data, nbytes, &param));
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
        const bool is_long = stream->longest && nbytes >= stream->enough;
        const size_t piece = smaller(nbytes, is_long ? stream->longest : stream->shortest);
        stream->unconfirmed += piece + LYNX_UCX_COST;
        send_one(ucx, stream, LYNX_UCX_DATA, from, piece, is_long ? SEND_RENDEZVOUS : SEND_EAGER, operation);
        from += piece;
        nbytes -= piece;
    }
}

void lynx_ucx_tell(const lynx_ucx *ucx, lynx_ucx_stream *stream, int kind, lynx_ucx_operation *operation) {
    lynx_ucx_begin(ucx, operation);
    send_one(ucx, stream, kind, NULL, 0, SEND_EAGER, operation);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void lynx_ucx_open_stream(lynx_ucx *ucx, lynx_ucx_stream *stream) {
    stream->next = ucx->streams;
    ucx->streams = stream;
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

uint64_t lynx_ucx_news(lynx_ucx *ucx) {
    ucx->news = 0;
    for (lynx_ucx_stream *stream = ucx->streams; stream != NULL; stream = stream->next) {
        if (stream->news) {
            stream->news = 0;
            ucx->news = 1; /* there may be more */
            return stream->mine;
        }
    }
    return 0;
}

static void tell_of(lynx_ucx *ucx, lynx_ucx_stream *stream) {
    stream->receiver_waits = 0; /* it need not hear of every message */
    stream->news = ucx->news = 1;
}

static void refuse(lynx_ucx *ucx, lynx_ucx_stream *stream, int why) {
    stream->refused = why;
    tell_of(ucx, stream);
}

/* Room for a message more in the inbox; NULL if there is no memory. */
static lynx_ucx_message *room_for_one(lynx_ucx_stream *stream) {
    if (stream->count == stream->room) {
        const size_t room = stream->room ? 2 * stream->room : 64;
        lynx_ucx_message *const inbox = malloc(room * sizeof *inbox);
        if (inbox == NULL)
            return NULL;
        for (size_t i = 0; i < stream->count; i++)
            inbox[i] = stream->inbox[(stream->first + i) % stream->room];
        free(stream->inbox);
        stream->inbox = inbox;
        stream->room = room;
        stream->first = 0;
    }
    return &stream->inbox[(stream->first + stream->count) % stream->room];
}

/* Keeps the bytes of a message, all but the first `read`. What it returns is the handler's result: whether they are kept
 * where they are. */
static ucs_status keep(
    lynx_ucx *ucx, lynx_ucx_stream *stream, void *data, size_t nbytes, size_t read, const ucp_am_recv_param *param) {
    if (stream->held + nbytes + LYNX_UCX_COST > LYNX_UCX_WINDOW) {
        refuse(ucx, stream, LYNX_UCX_EXCESS);
        return 0;
    }
    lynx_ucx_message *const message = room_for_one(stream);
    const bool stays = (param->attributes & (RECEIVED_DATA | RECEIVED_RENDEZVOUS)) != 0;
    uint8_t *const kept = stays || message == NULL ? data : malloc(nbytes);
    if (message == NULL || kept == NULL) {
        refuse(ucx, stream, LYNX_UCX_NO_MEMORY);
        return 0;
    }
    *message = (lynx_ucx_message){.data = kept, .nbytes = nbytes, .read = read};
    if (param->attributes & RECEIVED_RENDEZVOUS)
        message->whose = LYNX_UCX_PEER;
    else if (!stays) {
        memcpy(kept, data, nbytes);
        message->whose = LYNX_UCX_OURS;
    }
    stream->count++;
    stream->held += nbytes + LYNX_UCX_COST;
    if (stream->receiver_waits)
        tell_of(ucx, stream);
    return stays ? IN_PROGRESS : 0;
}

/* The next `nbytes` go to `to`. */
static void put(lynx_ucx_destination *to, const void *data, size_t nbytes) {
    memcpy(to->data + to->operation->nbytes, data, nbytes);
    to->operation->nbytes += nbytes;
}

/* A message was put as a whole. */
static void whole(lynx_ucx_destination *to, size_t nbytes) {
    to->operation->messages++;
    to->ended = nbytes < to->stream->shortest;
}

static ucs_status arrived(
    void *arg, const void *header, size_t header_nbytes, void *data, size_t nbytes, const ucp_am_recv_param *param) {
    lynx_ucx *const ucx = arg;
    message_header its;
    if (header_nbytes != sizeof its)
        return 0; /* nobody's */
    memcpy(&its, header, sizeof its);
    lynx_ucx_stream *const stream = stream_of(ucx, its.tag);
    if (stream == NULL || stream->refused)
        return 0;
    const uint64_t kind = its.tag & LYNX_UCX_KIND;
    if (kind != LYNX_UCX_CONFIRM && its.number != stream->came++) {
        refuse(ucx, stream, LYNX_UCX_IMPOSSIBLE);
        return 0;
    }
    const bool is_here = (param->attributes & RECEIVED_RENDEZVOUS) == 0;
    lynx_ucx_destination *const to = ucx->destination;
    if (kind == LYNX_UCX_DATA && nbytes > 0 && nbytes <= LYNX_UCX_PIECE && !stream->ended) {
        size_t read = 0;
        if (is_here && to != NULL && to->stream == stream && stream->count == 0) {
            read = smaller(nbytes, to->most - to->operation->nbytes);
            put(to, data, read);
            if (read == nbytes) {
                whole(to, nbytes);
                return 0;
            }
        }
        return keep(ucx, stream, data, nbytes, read, param);
    }
    if (kind == LYNX_UCX_CONFIRM && nbytes == 0 && stream->unconfirmed >= LYNX_UCX_CONFIRMED) {
        stream->unconfirmed -= LYNX_UCX_CONFIRMED;
        if (stream->sender_waits)
            tell_of(ucx, stream);
    } else if (kind == LYNX_UCX_END && nbytes == 0 && !stream->ended) {
        stream->ended = 1;
        if (stream->receiver_waits)
            tell_of(ucx, stream);
    } else
        refuse(ucx, stream, LYNX_UCX_IMPOSSIBLE);
    return 0;
}

int lynx_ucx_listen(lynx_ucx *ucx) {
    const ucp_am_handler_param param = {
        .field_mask = HANDLER_ID | HANDLER_FUNCTION | HANDLER_ARG, .id = HANDLER, .handler = arrived, .arg = ucx};
    return ((handler_function *)ucx->ucp_worker_set_am_recv_handler)(ucx->worker, &param);
}

void lynx_ucx_let_go(lynx_ucx *ucx) {
    const ucp_am_handler_param param = {.field_mask = HANDLER_ID | HANDLER_FUNCTION, .id = HANDLER};
    ((handler_function *)ucx->ucp_worker_set_am_recv_handler)(ucx->worker, &param);
}

static lynx_ucx_message take(lynx_ucx_stream *stream) {
    const lynx_ucx_message message = stream->inbox[stream->first];
    stream->first = (stream->first + 1) % stream->room;
    stream->count--;
    stream->held -= message.nbytes + LYNX_UCX_COST;
    return message;
}

static void release(const lynx_ucx *ucx, const lynx_ucx_message *message) {
    if (message->whose == LYNX_UCX_OURS)
        free(message->data);
    else
        ((release_function *)ucx->ucp_am_data_release)(ucx->worker, message->data);
}

void lynx_ucx_close_stream(lynx_ucx *ucx, lynx_ucx_stream *stream) {
    lynx_ucx_stream **at = &ucx->streams;
    while (*at != NULL && *at != stream)
        at = &(*at)->next;
    if (*at != NULL)
        *at = stream->next;
    while (stream->count) {
        const lynx_ucx_message message = take(stream);
        release(ucx, &message);
    }
    free(stream->inbox);
    stream->inbox = NULL;
    stream->room = 0;
}

/* More messages are to be expected, and there is room. */
static bool more(const lynx_ucx_destination *to) {
    return !to->ended && to->operation->nbytes < to->most;
}

/* What is in the inbox, as far as there is room. */
static void empty(const lynx_ucx *ucx, lynx_ucx_destination *to) {
    lynx_ucx_stream *const stream = to->stream;
    lynx_ucx_operation *const operation = to->operation;
    while (stream->count && operation->nbytes < to->most) {
        lynx_ucx_message *const next = &stream->inbox[stream->first];
        const size_t room = to->most - operation->nbytes;
        if (next->whose != LYNX_UCX_PEER) {
            const size_t nbytes = smaller(next->nbytes - next->read, room);
            put(to, next->data + next->read, nbytes);
            next->read += nbytes;
            if (next->read < next->nbytes)
                return;
            const lynx_ucx_message message = take(stream);
            release(ucx, &message);
            whole(to, message.nbytes);
            continue;
        }
        if (next->nbytes > room) {
            to->ended = 1;
            return;
        }
        const ucp_request_param param = {
            .op_attr_mask = FIELD_CALLBACK | FIELD_USER_DATA | FIELD_MEMORY_TYPE,
            .callback.receive = received,
            .user_data = operation,
            .memory_type = HOST_MEMORY,
        };
        const lynx_ucx_message message = take(stream);
        uint8_t *const data = to->data + operation->nbytes;
        operation->nbytes += message.nbytes;
        whole(to, message.nbytes);
        under_way(operation);
        settle(operation,
            ((receive_function *)ucx->ucp_am_recv_data_nbx)(ucx->worker, message.data, data, message.nbytes, &param));
    }
}

void lynx_ucx_confirm(lynx_ucx *ucx, lynx_ucx_stream *stream, lynx_ucx_operation *operation) {
    const size_t cost = operation->nbytes + operation->messages * LYNX_UCX_COST;
    stream->unsaid += cost - operation->counted;
    operation->counted = cost;
    ucx->confirming.ucp_request_free = ucx->ucp_request_free;
    while (stream->unsaid >= LYNX_UCX_CONFIRMED && stream->endpoint != NULL) {
        stream->unsaid -= LYNX_UCX_CONFIRMED;
        send_one(ucx, stream, LYNX_UCX_CONFIRM, NULL, 0, SEND_EAGER, &ucx->confirming);
    }
}

/* `to`, or NULL: where what comes goes, as `operation`. */
static int poll_for(lynx_ucx *ucx, lynx_ucx_operation *operation, lynx_ucx_destination *to) {
    progress_function *const progress = (progress_function *)ucx->ucp_worker_progress;
    uint64_t began = 0, moved = 0;
    unsigned busy = 0;
    bool yielded = false;
    for (;;) {
        const unsigned rounds = progress(ucx->worker);
        if (to != NULL && to->stream->count)
            empty(ucx, to);
        const bool ready = operation != NULL && operation->left == 0;
        if (ready && to != NULL && rounds)
            lynx_ucx_confirm(ucx, to->stream, operation);
        if (ucx->news)
            return LYNX_UCX_NEWS;
        if (ready && (to == NULL || !more(to)))
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
            busy = 0;
            moved = now;
            yielded = false;
        } else if (some && now - moved >= LINGER_NS)
            return LYNX_UCX_OVER;
        else if (now - moved >= ucx->quiet_ns)
            return LYNX_UCX_QUIET;
        if (now - began >= ucx->most_ns)
            return some ? LYNX_UCX_OVER : LYNX_UCX_BUSY;
        if (!yielded && now - moved >= YIELD_NS) {
            sched_yield();
            yielded = true;
        }
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
    lynx_ucx_destination to = {.stream = stream, .operation = operation, .data = data, .most = most};
    lynx_ucx_begin(ucx, operation);
    empty(ucx, &to);
    int outcome = operation->nbytes == 0 && to.ended ? LYNX_UCX_LONG : LYNX_UCX_OVER;
    if (operation->left || more(&to)) {
        ucx->destination = &to;
        outcome = poll_for(ucx, operation, &to);
        ucx->destination = NULL;
    }
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
