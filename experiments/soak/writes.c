/* Kills the process before the n-th change that it makes to a file: preloaded, and armed by the process itself. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long left = -1, seen = 0; /* changes until the end, -1 for none; changes so far */

void soak_arm(long n) { left = n; seen = 0; }
long soak_seen(void) { return seen; }

static void change(void) {
  seen++;
  if (left > 0 && --left == 0) kill(getpid(), SIGKILL);
}

static void change_file(int fd) { /* not a pipe, a socket or a terminal */
  struct stat about;
  if (fd > 2 && fstat(fd, &about) == 0 && S_ISREG(about.st_mode)) change();
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define ON_FILE(type, name, declared, fd, ...) type name declared { REAL(name); change_file(fd); return real(__VA_ARGS__); }
#define ALWAYS(name, declared, ...) int name declared { REAL(name); change(); return real(__VA_ARGS__); }

ON_FILE(ssize_t, write, (int fd, const void *from, size_t size), fd, fd, from, size)
ON_FILE(ssize_t, writev, (int fd, const struct iovec *from, int count), fd, fd, from, count)
ON_FILE(ssize_t, pwrite64, (int fd, const void *from, size_t size, off64_t at), fd, fd, from, size, at)
ON_FILE(size_t, fwrite, (const void *from, size_t size, size_t count, FILE *to), fileno(to), from, size, count, to)
ON_FILE(int, fsync, (int fd), fd, fd)
ON_FILE(int, fdatasync, (int fd), fd, fd)
ON_FILE(int, ftruncate64, (int fd, off64_t size), fd, fd, size)
ON_FILE(int, posix_fallocate64, (int fd, off64_t from, off64_t size), fd, fd, from, size)
ALWAYS(msync, (void *from, size_t size, int how), from, size, how)
ALWAYS(rename, (const char *from, const char *to), from, to)
ALWAYS(renameat, (int a, const char *from, int b, const char *to), a, from, b, to)
ALWAYS(unlink, (const char *path), path)
ALWAYS(unlinkat, (int folder, const char *path, int how), folder, path, how)
ALWAYS(rmdir, (const char *path), path)
ALWAYS(mkdir, (const char *path, mode_t mode), path, mode)
ALWAYS(symlink, (const char *to, const char *path), to, path)
