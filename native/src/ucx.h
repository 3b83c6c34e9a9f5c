/* UCX's tagged messages as transports/_ucxx.py uses them. Nothing here links with UCX: the caller finds its functions in
 * the library that ucxx has loaded. Internal; not part of the library's API. */
#ifndef LYNX_UCX_H
#define LYNX_UCX_H

#include <stddef.h>
#include <stdint.h>

/* What lynx_ucx_poll returns. */
#define LYNX_UCX_QUIET 0 /* nothing happened for as long as was asked */
#define LYNX_UCX_BUSY 1 /* time is up, and things are moving */
#define LYNX_UCX_OVER 2 /* the operation is over */
#define LYNX_UCX_FOUND 3 /* a message that the caller is to see has come, or something that a stream waited for */
#define LYNX_UCX_LONG 4 /* the next message is longer than the place for it */

/* What a tag's lowest bits say; the others are the receiving stream's. */
#define LYNX_UCX_DATA 0
#define LYNX_UCX_CONFIRM 1
#define LYNX_UCX_END 2
#define LYNX_UCX_KIND 3

#define LYNX_UCX_PIECE 524288 /* bytes of a message at most */
#define LYNX_UCX_COST 512 /* what a message counts beside its bytes */
#define LYNX_UCX_WINDOW 5242880 /* bytes, so counted, that may be under way until the peer has read them */
#define LYNX_UCX_CONFIRMED 524288 /* of which the peer is told at a time */
#define LYNX_UCX_AHEAD 16 /* messages whose places are named before they come, at most: as many as a round of UCX takes */

#define LYNX_UCX_REFUSED 1000 /* an operation's error that UCX does not know: a message that cannot be */

/* A message that has come and is to be received: until then it is UCX's. No handle: a stream has what it waited for. */
typedef struct {
    void *handle;
    uint64_t tag;
    size_t nbytes;
} lynx_ucx_message;

/* One peer's: messages that have come and nobody has received yet, and what may be sent. */
typedef struct lynx_ucx_stream {
    struct lynx_ucx_stream *next;
    uint64_t mine; /* tags, without the kind */
    uint64_t theirs;
    void *endpoint; /* NULL if there is none, or no more */
    /* How bytes become messages: `longest` as long as `enough` are left, if it is not 0, then `shortest`. */
    size_t longest;
    size_t enough;
    size_t shortest;
    lynx_ucx_message *inbox; /* a ring */
    size_t room;
    size_t first;
    size_t count;
    size_t held; /* what those count */
    size_t unconfirmed; /* what was sent counts, but for what the peer has read */
    size_t unsaid; /* what was read counts, but for what the peer was told of */
    int receiver_waits; /* somebody is to be told when a message comes */
    int sender_waits; /* or is confirmed */
} lynx_ucx_stream;

/* Where a message is to go that has not come: UCX's request, NULL once that is over; what came then. */
typedef struct {
    struct lynx_ucx_operation *operation;
    void *request;
    uint8_t *data;
    size_t nbytes;
} lynx_ucx_place;

/* A send or receive, of one or more messages: 1 while it is under way, then 0 or the first error, UCX's (negative) or
 * LYNX_UCX_REFUSED. Must outlive it. */
typedef struct lynx_ucx_operation {
    volatile int status;
    int failed;
    size_t left; /* messages that are under way */
    size_t nbytes;
    size_t messages;
    uintptr_t ucp_request_free;
    /* Of a receive. */
    uint8_t *data;
    size_t whole; /* bytes of a message behind which more are to be expected */
    size_t counted; /* as read */
    int ended; /* a message was shorter, or does not fit */
    unsigned awaited; /* places whose messages have not come */
    unsigned first; /* a ring */
    unsigned count;
    lynx_ucx_place places[LYNX_UCX_AHEAD];
} lynx_ucx_operation;

/* A worker, the functions of libucp, and for how long to poll: until nothing has happened for `quiet_ns`, or so many
 * nanoseconds are over (`most_ns`); what was found then; its open streams; what receives messages that are dropped here. */
typedef struct {
    uint64_t quiet_ns;
    uint64_t most_ns;
    lynx_ucx_message found;
    lynx_ucx_stream *streams;
    lynx_ucx_operation dropped;
    void *worker;
    uintptr_t ucp_worker_progress;
    uintptr_t ucp_request_cancel;
    uintptr_t ucp_tag_probe_nb;
    uintptr_t ucp_tag_recv_nbx;
    uintptr_t ucp_tag_msg_recv_nbx;
    uintptr_t ucp_tag_send_nbx;
    uintptr_t ucp_request_free;
    uintptr_t ucp_ep_close_nbx;
    uintptr_t ucp_ep_query;
} lynx_ucx;

/* The names of the devices' transports that an endpoint uses, `most` of them; how many, or UCX's (negative) error. */
int lynx_ucx_transports(const lynx_ucx *ucx, void *endpoint, const char **names, int most);

/* A stream is known by its tag from then on, until it is closed. */
void lynx_ucx_open_stream(lynx_ucx *ucx, lynx_ucx_stream *stream);
void lynx_ucx_close_stream(lynx_ucx *ucx, lynx_ucx_stream *stream);

/* Takes the next message out of a stream's inbox, as `found`; 0 if there is none. */
int lynx_ucx_take(lynx_ucx *ucx, lynx_ucx_stream *stream);

/* An operation without messages. */
void lynx_ucx_begin(const lynx_ucx *ucx, lynx_ucx_operation *operation);

/* Starts to send `nbytes` from `data` too, which must stay as it is until the operation is over. */
void lynx_ucx_send(const lynx_ucx *ucx, lynx_ucx_stream *stream, const void *data, size_t nbytes, lynx_ucx_operation *operation);

/* Starts to send a message without bytes. */
void lynx_ucx_tell(const lynx_ucx *ucx, const lynx_ucx_stream *stream, int kind, lynx_ucx_operation *operation);

/* Starts to receive a message that was found into `nbytes` at `data`; what does not fit is lost, and an error. */
void lynx_ucx_receive(const lynx_ucx *ucx, void *message, void *data, size_t nbytes, lynx_ucx_operation *operation);

/* Makes progress until `operation` (or NULL) is over, there is something to see, or it has polled for long enough; at least
 * once. Messages of streams go to their inboxes. */
int lynx_ucx_poll(lynx_ucx *ucx, lynx_ucx_operation *operation);

/* An operation that sends `nbytes` from `data`, and polls. */
int lynx_ucx_send_poll(lynx_ucx *ucx, lynx_ucx_stream *stream, const void *data, size_t nbytes, lynx_ucx_operation *operation);

/* Receives the stream's next messages into `most` bytes at `data`: those in its inbox, and those that come while it polls,
 * until the place is full, one has come that is shorter than the peer cuts them, or nothing comes. The operation's size
 * tells, which is 0 if there was none. The peer is told of what was read, unless the operation is still under way. */
int lynx_ucx_receive_poll(lynx_ucx *ucx, lynx_ucx_stream *stream, void *data, size_t most, lynx_ucx_operation *operation);

/* Tells the peer of what the operation, which is over, has read beyond what it knows. */
void lynx_ucx_confirm(lynx_ucx *ucx, lynx_ucx_stream *stream, lynx_ucx_operation *operation);

/* Closes an endpoint at once; what is under way on it ends. */
void lynx_ucx_close_endpoint(const lynx_ucx *ucx, void *endpoint, lynx_ucx_operation *operation);

#endif
