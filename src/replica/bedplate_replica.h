/* Reads a node's base images in the reader's own process.
 *
 * Build the library (a few hundred KB; it needs nothing but libc):
 *
 *   cargo rustc -p bedplate-replica --release --features capi --crate-type staticlib
 *
 * or `--crate-type cdylib` for a shared one. All functions may be called from any thread, and on
 * one replica from many threads at once, but for bedplate_replica_free. Those that return an int
 * return 0, or a negative errno:
 *
 *   -ENOTCONN  the engine does not answer        -ENOENT  no such image, or it is not ready
 *   -EACCES    this user may not                 -EINVAL  a range past the end, a null pointer
 *   -EIO       bytes that can't be read          -ESTALE  another image has the name now
 *   -EPROTO    library and engine do not fit     -EUSERS  too many readers
 */
#ifndef BEDPLATE_REPLICA_H
#define BEDPLATE_REPLICA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A base image that is attached. */
typedef struct bedplate_replica bedplate_replica;

/* For bedplate_replica_attach: reads from maps, without system calls for what is in memory. The
 * process gets a handler of SIGBUS, which passes on what is not its own. */
#define BEDPLATE_REPLICA_MAPPED 1u

enum bedplate_extent_kind {
  BEDPLATE_DATA = 1,    /* bytes in a file */
  BEDPLATE_ZERO = 2,    /* zeroes */
  BEDPLATE_ENCODED = 3, /* in a compressed block */
  BEDPLATE_ABSENT = 4   /* not on this disk yet: a read waits for it */
};

struct bedplate_extent {
  uint64_t at;        /* its first byte */
  uint64_t len_bytes; /* at least 1 */
  uint32_t kind;      /* enum bedplate_extent_kind */
  uint32_t later;
};

/* Attaches to an image, on the engine that listens at socket. patience_ms: how long an answer may
 * take, and how long an engine that has gone is waited for; 0: a minute. On an error, its text goes
 * to message, as far as message_bytes allow; message may be NULL. */
int bedplate_replica_attach(const char *socket, const char *image, uint32_t flags,
                            uint32_t patience_ms, bedplate_replica **out, char *message,
                            size_t message_bytes);

/* Length of the disk in bytes. */
uint64_t bedplate_replica_size(const bedplate_replica *replica);

/* The same text for the same image with the same bytes; cut off at text_bytes - 1. */
int bedplate_replica_identity(const bedplate_replica *replica, char *text, size_t text_bytes);

/* Fills buf with len bytes of the disk from at on; on an error buf holds anything. */
int bedplate_replica_read_at(const bedplate_replica *replica, void *buf, size_t len, uint64_t at);

/* What the disk is at at, and how long that goes on; no further than limit_bytes. */
int bedplate_replica_extent_at(const bedplate_replica *replica, uint64_t at, uint64_t limit_bytes,
                               struct bedplate_extent *out);

/* Ends the attachment; NULL is fine. Nobody may use it meanwhile or after. */
void bedplate_replica_free(bedplate_replica *replica);

#ifdef __cplusplus
}
#endif

#endif
