// Preloaded into a daemon, records what it writes to its database, its log and its files of payloads, and when it syncs them.
//
// A record is a header and, for a write, its bytes. The record of a write is made under the same lock as the write, so
// the order of records is the order of writes. A sync has two: it makes durable what was written before the first, once
// the second is there.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, TRUNCATE = 2, SYNC = 3, SYNCED = 4 };
enum { OTHER = 0, DATABASE = 1, LOG = 2, PAYLOADS = 3 }; // and those from there on, one for each file
enum { FILES = 1024 };

struct header {
    uint32_t operation;
    uint32_t file;
    uint64_t offset; // of a write; the length after a truncation; the number of a sync
    uint64_t length; // of the bytes that follow
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned char kinds[FILES];
static int recording = -1;
static uint64_t syncs;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int kind(int fd) { return fd >= 0 && fd < FILES ? kinds[fd] : OTHER; }

static void record(uint32_t operation, int file, uint64_t offset, const void *bytes, uint64_t length) {
    struct header header = {operation, (uint32_t)file, offset, length};
    struct iovec parts[2] = {{&header, sizeof header}, {(void *)bytes, length}};
    if (writev(recording, parts, length ? 2 : 1) != (ssize_t)(sizeof header + length)) abort();
}

static int ends_with(const char *path, const char *end) {
    size_t all = strlen(path), tail = strlen(end);
    return all >= tail && strcmp(path + all - tail, end) == 0;
}

static unsigned char payloads(const char *path) {
    const char *name = strstr(path, "/ledger.payloads/");
    int number = name ? atoi(name + strlen("/ledger.payloads/")) : 0;
    if (number > 255 - PAYLOADS) abort();
    return number ? PAYLOADS - 1 + number : OTHER;
}

static int opened(int fd, const char *path) {
    if (fd < 0 || fd >= FILES) return fd;
    pthread_mutex_lock(&lock);
    if (recording < 0) {
        const char *to = getenv("RECORD_WRITES_TO");
        recording = to ? REAL(open)(to, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
        if (recording < 0) abort();
    }
    kinds[fd] = ends_with(path, "/ledger.db") ? DATABASE : ends_with(path, "/ledger.db-wal") ? LOG : payloads(path);
    pthread_mutex_unlock(&lock);
    return fd;
}

#define OPEN(name)                                                                   \
    int name(const char *path, int flags, ...) {                                     \
        va_list more;                                                                \
        va_start(more, flags);                                                       \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;      \
        va_end(more);                                                                \
        return opened(REAL(name)(path, flags, mode), path);                          \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                 \
    int name(int at, const char *path, int flags, ...) {                             \
        va_list more;                                                                \
        va_start(more, flags);                                                       \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;      \
        va_end(more);                                                                \
        return opened(REAL(name)(at, path, flags, mode), path);                      \
    }
OPENAT(openat)
OPENAT(openat64)

int close(int fd) {
    if (fd >= 0 && fd < FILES) kinds[fd] = OTHER;
    return REAL(close)(fd);
}

static ssize_t written(ssize_t done, int fd, const void *bytes, off_t offset) {
    if (done > 0) record(WRITE, kind(fd), (uint64_t)offset, bytes, (uint64_t)done);
    return done;
}

#define PWRITE(name, type)                                                           \
    ssize_t name(int fd, const void *bytes, size_t length, type offset) {            \
        if (!kind(fd)) return REAL(name)(fd, bytes, length, offset);                 \
        pthread_mutex_lock(&lock);                                                   \
        ssize_t done = written(REAL(name)(fd, bytes, length, offset), fd, bytes, offset); \
        pthread_mutex_unlock(&lock);                                                 \
        return done;                                                                 \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t write(int fd, const void *bytes, size_t length) {
    if (!kind(fd)) return REAL(write)(fd, bytes, length);
    pthread_mutex_lock(&lock);
    off_t offset = lseek(fd, 0, SEEK_CUR);
    ssize_t done = written(REAL(write)(fd, bytes, length), fd, bytes, offset);
    pthread_mutex_unlock(&lock);
    return done;
}

#define TRUNCATION(name, type)                                                       \
    int name(int fd, type length) {                                                  \
        if (!kind(fd)) return REAL(name)(fd, length);                                \
        pthread_mutex_lock(&lock);                                                   \
        int done = REAL(name)(fd, length);                                           \
        if (done == 0) record(TRUNCATE, kind(fd), (uint64_t)length, NULL, 0);        \
        pthread_mutex_unlock(&lock);                                                 \
        return done;                                                                 \
    }
TRUNCATION(ftruncate, off_t)
TRUNCATION(ftruncate64, off64_t)

#define SYNCING(name)                                                                \
    int name(int fd) {                                                               \
        if (!kind(fd)) return REAL(name)(fd);                                        \
        pthread_mutex_lock(&lock);                                                   \
        uint64_t number = ++syncs;                                                   \
        record(SYNC, kind(fd), number, NULL, 0);                                     \
        pthread_mutex_unlock(&lock);                                                 \
        int done = REAL(name)(fd);                                                   \
        pthread_mutex_lock(&lock);                                                   \
        if (done == 0) record(SYNCED, kind(fd), number, NULL, 0);                    \
        pthread_mutex_unlock(&lock);                                                 \
        return done;                                                                 \
    }
SYNCING(fsync)
SYNCING(fdatasync)
