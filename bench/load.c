/* The load of the bench, in C so that the load is not what is measured. Linux.
 *
 *   load serve                                  a service on a free port of 127.0.0.1, which it prints
 *   load bulk down|up PORT SERVICE N WARM S     N streams; after WARM s prints "start", after S s more "BYTES SECONDS"
 *   load echo PORT BYTES WARM S                 one message at a time; prints "P50 P99 COUNT", in microseconds
 *   load idle PORT N LIMIT                      opens N visitors, 64 at a time, and prints "OPENED SECONDS";
 *                                               after a line on stdin talks to each again, prints "ANSWERED SECONDS"
 *
 * PORT is where visitors connect, SERVICE the port of the service itself. A visitor's first byte says what it wants:
 * 'D' bytes without end, 'U' a sink, 'E' an echo, 'C' how many bytes all sinks have taken (8 bytes, native order).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK = 256 * 1024, EVENTS = 256, IN_FLIGHT = 64, MAX_ECHOES = 1 << 22 };

static _Atomic uint64_t moved; /* bytes: taken by all sinks (serve), received by all streams (bulk) */

static void fail(const char *what)
{
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void rest(double seconds)
{
    struct timespec t = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
    nanosleep(&t, NULL);
}

static struct sockaddr_in loopback(int port)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return a;
}

static void no_delay(int fd)
{
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

/* A visitor that has said what it wants. */
static int visit(int port, char wish)
{
    struct sockaddr_in a = loopback(port);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&a, sizeof a) || send(fd, &wish, 1, 0) != 1)
        fail("connect");
    no_delay(fd);
    return fd;
}

static void *give(void *fd)
{
    char *chunk = calloc(1, CHUNK);
    while (send((intptr_t)fd, chunk, CHUNK, MSG_NOSIGNAL) > 0)
        ;
    close((intptr_t)fd);
    free(chunk);
    return NULL;
}

static void *take(void *fd)
{
    char *chunk = malloc(CHUNK);
    ssize_t n;
    while ((n = recv((intptr_t)fd, chunk, CHUNK, 0)) > 0)
        moved += n;
    close((intptr_t)fd);
    free(chunk);
    return NULL;
}

static void start(void *(*work)(void *), int fd)
{
    pthread_t thread;
    if (pthread_create(&thread, NULL, work, (void *)(intptr_t)fd))
        fail("thread");
    pthread_detach(thread);
}

static void watch(int ep, int fd, uint32_t events, uint32_t mark)
{
    struct epoll_event e = {.events = events, .data.u64 = (uint64_t)mark << 32 | (uint32_t)fd};
    if (epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e))
        fail("epoll");
}

/* Echoes run in this loop, 10,000 of them too; a stream of bytes gets a thread of its own. */
static void serve(void)
{
    struct sockaddr_in a = loopback(0);
    socklen_t size = sizeof a;
    int listener = socket(AF_INET, SOCK_STREAM, 0), ep = epoll_create1(0);
    if (bind(listener, (struct sockaddr *)&a, size) || listen(listener, 4096))
        fail("listen");
    getsockname(listener, (struct sockaddr *)&a, &size);
    printf("%d\n", ntohs(a.sin_port));
    fflush(stdout);
    enum { LISTENER, NEW, ECHO };
    watch(ep, listener, EPOLLIN, LISTENER);
    for (struct epoll_event events[EVENTS];;) {
        int n = epoll_wait(ep, events, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            int fd = (int)(uint32_t)events[i].data.u64, mark = events[i].data.u64 >> 32;
            char bytes[4096], wish = 'E';
            if (mark == LISTENER) {
                if ((fd = accept(listener, NULL, NULL)) >= 0) {
                    no_delay(fd);
                    watch(ep, fd, EPOLLIN, NEW);
                }
                continue;
            }
            if (mark == NEW) {
                if (recv(fd, &wish, 1, 0) != 1) {
                    close(fd);
                    continue;
                }
                epoll_ctl(ep, EPOLL_CTL_DEL, fd, NULL);
                uint64_t count = moved;
                if (wish == 'E')
                    watch(ep, fd, EPOLLIN, ECHO);
                else if (wish == 'C') {
                    send(fd, &count, sizeof count, MSG_NOSIGNAL);
                    close(fd);
                } else
                    start(wish == 'D' ? give : take, fd);
                continue;
            }
            ssize_t got = recv(fd, bytes, sizeof bytes, 0);
            if (got <= 0 || send(fd, bytes, got, MSG_NOSIGNAL) != got)
                close(fd);
        }
    }
}

/* What has arrived at the far end: an upload is counted by the service, not by who sends. */
static uint64_t arrived(int up, int service)
{
    uint64_t count = moved;
    if (up) {
        int fd = visit(service, 'C');
        if (recv(fd, &count, sizeof count, MSG_WAITALL) != sizeof count)
            fail("count");
        close(fd);
    }
    return count;
}

static void bulk(int up, int port, int service, int streams, double warm, double seconds)
{
    for (int i = 0; i < streams; i++)
        start(up ? give : take, visit(port, up ? 'U' : 'D'));
    rest(warm);
    puts("start");
    fflush(stdout);
    double from = now();
    uint64_t before = arrived(up, service);
    rest(seconds);
    uint64_t after = arrived(up, service);
    printf("%llu %.6f\n", (unsigned long long)(after - before), now() - from);
}

static int by_size(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void echo(int port, int size, double warm, double seconds)
{
    int fd = visit(port, 'E'), count = 0;
    char *message = calloc(1, size);
    float *times = malloc(MAX_ECHOES * sizeof *times);
    double begin = now(), before = begin;
    while (before < begin + warm + seconds && count < MAX_ECHOES) {
        if (send(fd, message, size, 0) != size || recv(fd, message, size, MSG_WAITALL) != size)
            fail("echo");
        double after = now();
        if (before > begin + warm)
            times[count++] = (after - before) * 1e6;
        before = after;
    }
    if (!count)
        fail("no echo");
    qsort(times, count, sizeof *times, by_size);
    printf("%.1f %.1f %d\n", times[count / 2], times[(int)(count * 0.99)], count);
}

static int open_one(int ep, int port)
{
    struct sockaddr_in a = loopback(port);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (fd < 0 || (connect(fd, (struct sockaddr *)&a, sizeof a) && errno != EINPROGRESS))
        fail("connect");
    no_delay(fd);
    watch(ep, fd, EPOLLOUT | EPOLLONESHOT, 0);
    return fd;
}

/* A visitor is open when its first byte has come back. */
static int open_all(int ep, int port, int *fds, int wanted, double limit)
{
    int begun = 0, opened = 0;
    struct epoll_event events[EVENTS];
    while (opened < wanted && now() < limit) {
        while (begun < wanted && begun - opened < IN_FLIGHT)
            fds[begun++] = open_one(ep, port);
        int n = epoll_wait(ep, events, EVENTS, 1000);
        for (int i = 0; i < n; i++) {
            int fd = (int)(uint32_t)events[i].data.u64;
            char byte;
            if (events[i].events & EPOLLOUT) {
                if (send(fd, "Ea", 2, MSG_NOSIGNAL) != 2)
                    continue; /* refused: it never opens */
                events[i].events = EPOLLIN;
                epoll_ctl(ep, EPOLL_CTL_MOD, fd, &events[i]);
            } else if (recv(fd, &byte, 1, 0) == 1)
                opened++;
            else
                epoll_ctl(ep, EPOLL_CTL_DEL, fd, NULL);
        }
    }
    return opened;
}

static int talk_again(const int *fds, int count, double limit)
{
    int answered = 0;
    char byte = 'a';
    for (int i = 0; i < count; i++)
        send(fds[i], &byte, 1, MSG_NOSIGNAL);
    for (int i = 0; i < count; i++) {
        ssize_t got;
        while ((got = recv(fds[i], &byte, 1, 0)) < 0 && errno == EAGAIN && now() < limit)
            rest(0.001);
        answered += got == 1;
    }
    return answered;
}

static void idle(int port, int wanted, double limit)
{
    int *fds = malloc(wanted * sizeof *fds), ep = epoll_create1(0);
    double from = now();
    int opened = open_all(ep, port, fds, wanted, from + limit);
    printf("%d %.6f\n", opened, now() - from);
    fflush(stdout);
    if (getchar() == EOF)
        exit(1);
    from = now();
    int answered = talk_again(fds, opened, from + limit);
    printf("%d %.6f\n", answered, now() - from);
}

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN);
    const char *what = argc > 1 ? argv[1] : "";
    if (!strcmp(what, "serve") && argc == 2)
        serve();
    else if (!strcmp(what, "bulk") && argc == 8)
        bulk(!strcmp(argv[2], "up"), atoi(argv[3]), atoi(argv[4]), atoi(argv[5]), atof(argv[6]), atof(argv[7]));
    else if (!strcmp(what, "echo") && argc == 6)
        echo(atoi(argv[2]), atoi(argv[3]), atof(argv[4]), atof(argv[5]));
    else if (!strcmp(what, "idle") && argc == 5)
        idle(atoi(argv[2]), atoi(argv[3]), atof(argv[4]));
    else {
        fputs("load: see the top of load.c\n", stderr);
        return 2;
    }
    return 0;
}
