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
#define LYNX_UCX_FOUND 3 /* a message has come */

/* A message that has come and is to be received: until then it is UCX's. */
typedef struct {
    void *handle;
    uint64_t tag;
    size_t nbytes;
} lynx_ucx_message;

/* A worker, the functions of libucp, and for how long to poll: until nothing has happened for `quiet_ns`, or so many
 * nanoseconds are over (`most_ns`); what was found then. */
typedef struct {
    uint64_t quiet_ns;
    uint64_t most_ns;
    lynx_ucx_message found;
    void *worker;
    uintptr_t ucp_worker_progress;
    uintptr_t ucp_tag_probe_nb;
    uintptr_t ucp_tag_msg_recv_nbx;
    uintptr_t ucp_tag_send_nbx;
    uintptr_t ucp_request_free;
    uintptr_t ucp_ep_close_nbx;
} lynx_ucx;

/* A send or receive, of one or more messages: 1 while it is under way, then 0 or UCX's first (negative) error. Must outlive
 * it. */
typedef struct {
    volatile int status;
    int failed;
    size_t left; /* messages, and 1 while there may be more */
    size_t nbytes;
    const lynx_ucx *ucx;
} lynx_ucx_operation;

/* Starts to send `nbytes` from `data`, which must stay as it is until the operation is over. */
void lynx_ucx_send(
    const lynx_ucx *ucx, void *endpoint, const void *data, size_t nbytes, uint64_t tag, lynx_ucx_operation *operation);

/* Starts to receive a message that was found into `nbytes` at `data`; what does not fit is lost, and an error. */
void lynx_ucx_receive(const lynx_ucx *ucx, void *message, void *data, size_t nbytes, lynx_ucx_operation *operation);

/* Makes progress until `operation` (or NULL) is over, a message comes, or it has polled for long enough; at least once. */
int lynx_ucx_poll(lynx_ucx *ucx, lynx_ucx_operation *operation);

/* Sends in messages of `piece` bytes, and polls. */
int lynx_ucx_send_poll(lynx_ucx *ucx, void *endpoint, const void *data, size_t nbytes, size_t piece, uint64_t tag,
    lynx_ucx_operation *operation);

/* Polls, but the first message, if it has this tag and 1 to `piece` and `most` bytes, is not returned: `operation` becomes
 * its receiving, to `data`. So are those that follow, as long as none has less than `enough` bytes. The operation's size
 * tells, which is 0 until then. */
int lynx_ucx_receive_poll(lynx_ucx *ucx, uint64_t tag, void *data, size_t most, size_t piece, size_t enough,
    lynx_ucx_operation *operation);

/* Closes an endpoint at once; what is under way on it ends. */
void lynx_ucx_close_endpoint(const lynx_ucx *ucx, void *endpoint, lynx_ucx_operation *operation);

#endif
