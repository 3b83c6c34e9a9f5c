/* UCX's active messages as transports/_ucxx.py uses them. Nothing here links with UCX: the caller finds its functions in
 * the library that ucxx has loaded. Internal; not part of the library's API. */
#ifndef LYNX_UCX_H
#define LYNX_UCX_H

#include <stddef.h>
#include <stdint.h>

/* What lynx_ucx_poll returns. */
#define LYNX_UCX_QUIET 0 /* nothing happened for as long as was asked */
#define LYNX_UCX_BUSY 1 /* time is up, and things are moving */
#define LYNX_UCX_OVER 2 /* the operation is over */
#define LYNX_UCX_NEWS 3 /* there are streams with news */
#define LYNX_UCX_LONG 4 /* the next message is longer than the place for it, and comes only as a whole */

/* What the lowest bits of a message's tag say; the others are the receiving stream's. */
#define LYNX_UCX_DATA 0
#define LYNX_UCX_CONFIRM 1
#define LYNX_UCX_END 2
#define LYNX_UCX_KIND 3

#define LYNX_UCX_PIECE 524288 /* bytes of a message at most */
#define LYNX_UCX_COST 512 /* what a message counts beside its bytes */
#define LYNX_UCX_WINDOW 5242880 /* bytes, so counted, that may be under way until the peer has read them */
#define LYNX_UCX_CONFIRMED 524288 /* of which the peer is told at a time */

/* Why a stream takes nothing more. */
#define LYNX_UCX_IMPOSSIBLE 1 /* a message that cannot be */
#define LYNX_UCX_EXCESS 2 /* more than the window */
#define LYNX_UCX_NO_MEMORY 3

/* Bytes of a stream that have come and nobody has received yet. */
typedef struct {
    uint8_t *data; /* the bytes; or UCX's word for those that are with their sender */
    size_t nbytes;
    size_t read; /* of them */
    int whose; /* LYNX_UCX_UCX: the bytes are in UCX's memory; LYNX_UCX_OURS: in a copy; LYNX_UCX_PEER: with the sender */
} lynx_ucx_message;

#define LYNX_UCX_UCX 0
#define LYNX_UCX_OURS 1
#define LYNX_UCX_PEER 2

/* One peer's: messages that have come and nobody has received yet, and what may be sent. */
typedef struct lynx_ucx_stream {
    struct lynx_ucx_stream *next;
    uint64_t mine; /* tags, without the kind */
    uint64_t theirs;
    void *endpoint; /* NULL if there is none, or no more */
    /* How bytes become messages: `longest` as long as `enough` are left, if it is not 0, then `shortest`. Long ones stay with
     * the sender until the receiver says where they are to go, short ones are one packet. */
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
    uint64_t sent; /* messages that carry it */
    uint64_t came; /* UCX says nothing of their order, which is that of their packets; a gap is an error */
    int ended; /* the peer sends nothing more */
    int refused; /* 0, or why */
    int receiver_waits; /* somebody is to be told when a message comes */
    int sender_waits; /* or is confirmed */
    int news; /* and has not been */
} lynx_ucx_stream;

/* A send or receive, of one or more messages: 1 while it is under way, then 0 or UCX's first (negative) error. Must outlive
 * it. */
typedef struct {
    volatile int status;
    int failed;
    size_t left; /* messages that are under way */
    size_t nbytes;
    size_t messages; /* whole ones */
    size_t counted; /* of a receive: as read */
    uintptr_t ucp_request_free;
} lynx_ucx_operation;

/* Where the bytes of a stream go, one message after the other, instead of its inbox. */
typedef struct {
    lynx_ucx_stream *stream;
    lynx_ucx_operation *operation;
    uint8_t *data;
    size_t most;
    int ended; /* a message was shorter than the peer cuts them, or does not fit */
} lynx_ucx_destination;

/* A worker, the functions of libucp, and for how long to poll: until nothing has happened for `quiet_ns`, or so many
 * nanoseconds are over (`most_ns`); its open streams, and whether some have news; who receives; what confirms. */
typedef struct {
    uint64_t quiet_ns;
    uint64_t most_ns;
    lynx_ucx_stream *streams;
    int news;
    lynx_ucx_destination *destination;
    lynx_ucx_operation confirming;
    void *worker;
    uintptr_t ucp_worker_progress;
    uintptr_t ucp_worker_set_am_recv_handler;
    uintptr_t ucp_am_send_nbx;
    uintptr_t ucp_am_recv_data_nbx;
    uintptr_t ucp_am_data_release;
    uintptr_t ucp_request_free;
    uintptr_t ucp_ep_close_nbx;
    uintptr_t ucp_ep_query;
} lynx_ucx;

/* Messages are handed to this from now on, whoever sends them, until the worker is let go of: 0, or UCX's (negative) error. */
int lynx_ucx_listen(lynx_ucx *ucx);
void lynx_ucx_let_go(lynx_ucx *ucx);

/* The names of the devices' transports that an endpoint uses, `most` of them; how many, or UCX's (negative) error. */
int lynx_ucx_transports(const lynx_ucx *ucx, void *endpoint, const char **names, int most);

/* A stream is known by its tag from then on, until it is closed. What comes then is let go of. */
void lynx_ucx_open_stream(lynx_ucx *ucx, lynx_ucx_stream *stream);
void lynx_ucx_close_stream(lynx_ucx *ucx, lynx_ucx_stream *stream);

/* The tag of a stream with news, which is told with that; 0 if there is none. */
uint64_t lynx_ucx_news(lynx_ucx *ucx);

/* An operation without messages. */
void lynx_ucx_begin(const lynx_ucx *ucx, lynx_ucx_operation *operation);

/* Starts to send `nbytes` from `data` too, which must stay as it is until the operation is over. */
void lynx_ucx_send(const lynx_ucx *ucx, lynx_ucx_stream *stream, const void *data, size_t nbytes, lynx_ucx_operation *operation);

/* Starts to send a message without bytes. */
void lynx_ucx_tell(const lynx_ucx *ucx, lynx_ucx_stream *stream, int kind, lynx_ucx_operation *operation);

/* Makes progress until `operation` (or NULL) is over, there are news, or it has polled for long enough; at least once.
 * Messages go to their streams' inboxes. */
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
