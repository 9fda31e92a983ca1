/* Rows of a conformance report, and a pair of channels to make them with.
 *
 * A row names the function and the rule it is about: a page of the documentation or a D-n. It is printed as
 * `ROW <function> <rule> ok|FAIL`, which `cargo xtask conformance` counts. */
#ifndef CHECK_H
#define CHECK_H

#include <sched.h>
#include <semaphore.h>
#include <stdio.h>
#include <unistd.h>

#include "kmcl.h"

static KMCL_SERVER_INTERFACE_V1 k; /* everything is called through the table */
static int failures;

static inline void row(const char *function, const char *rule, int ok, const char *text, int line)
{
    printf("ROW %s %s %s\n", function, rule, ok ? "ok" : "FAIL");
    if (!ok) {
        printf("  line %d: %s\n", line, text);
        failures++;
    }
}
#define ROW(function, rule, condition) row(#function, rule, (condition) ? 1 : 0, #condition, __LINE__)

/* What a row rests on: without it the program has nothing to say. */
static inline void need(int ok, const char *text, int line)
{
    if (!ok) {
        printf("NEED line %d: %s\n", line, text);
        exit(2);
    }
}
#define NEED(condition) need((condition) ? 1 : 0, #condition, __LINE__)

static inline void await(sem_t *event)
{
    while (sem_wait(event) != 0) {
    }
}

/* Where a channel has moved, the client of a loopback bus may still ring the former one's doorbell: the new
 * one is looked after from here, too. */
static inline void await_moved(sem_t *event, VMBCHANNEL moved)
{
    while (sem_trywait(event) != 0) {
        (void)KmclChannelProcess(moved, PASSIVE_LEVEL, 64, NULL, NULL);
        sched_yield();
    }
}

/* A hang ends the program; nothing else depends on time. */
static inline void begin(void)
{
    alarm(120);
    (void)setvbuf(stdout, NULL, _IOLBF, 0);
    (void)KmclSetVerifier(FALSE);
    NEED(KmclQueryInterface(&KMCL_SERVER_INTERFACE_TYPE, sizeof k, KMCL_SERVER_INTERFACE_VERSION_V1,
                            (PINTERFACE)(void *)&k) == STATUS_SUCCESS);
}

static inline int end(void)
{
    k.InterfaceDereference(k.Context);
    printf("%s\n", failures ? "FAILED" : "passed");
    return failures ? 1 : 0;
}

static const GUID TYPE = {0x6c8d9f5eu, 0x3a41, 0x4c0b, {0x9d, 0x0e, 0x2f, 0x1b, 0x7a, 0x60, 0x11, 0xec}};
static const GUID INSTANCE = {0x00000001u, 0, 0, {0, 0, 0, 0, 0, 0, 0, 1}};

/* One end: the letters of its callbacks in order, and what to wait for. */
typedef struct SIDE {
    VMBCHANNEL channel;
    char log[64];
    size_t logged;
    sem_t active;
    sem_t closed;
    NTSTATUS opened_status;
    KIRQL irql; /* highest seen in a state-change callback */
} SIDE;

static SIDE server, client;

static inline SIDE *side_of(VMBCHANNEL channel)
{
    return channel == server.channel ? &server : &client;
}

static inline void note(VMBCHANNEL channel, char letter)
{
    SIDE *side = side_of(channel);
    if (side->logged + 1 < sizeof side->log) {
        side->log[side->logged++] = letter;
    }
    if (KeGetCurrentIrql() > side->irql) {
        side->irql = KeGetCurrentIrql();
    }
}

static inline NTSTATUS note_opened(VMBCHANNEL channel)
{
    note(channel, 'O');
    return side_of(channel)->opened_status;
}
static inline VOID note_started(VMBCHANNEL channel) { note(channel, 'S'); }
static inline VOID note_post_started(VMBCHANNEL channel)
{
    note(channel, 'P');
    sem_post(&side_of(channel)->active);
}
static inline VOID note_suspend(VMBCHANNEL channel) { note(channel, 'U'); }
static inline VOID note_closed(VMBCHANNEL channel)
{
    note(channel, 'C');
    sem_post(&side_of(channel)->closed);
}

static inline void init_side(SIDE *side)
{
    memset(side, 0, sizeof *side);
    NEED(sem_init(&side->active, 0, 0) == 0 && sem_init(&side->closed, 0, 0) == 0);
}

static inline VMB_CHANNEL_STATE_CHANGE_CALLBACKS noting(void)
{
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS callbacks;
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS_INIT(&callbacks);
    callbacks.EvtChannelOpened = note_opened;
    callbacks.EvtChannelClosed = note_closed;
    callbacks.EvtChannelSuspend = note_suspend;
    callbacks.EvtChannelStarted = note_started;
    callbacks.EvtChannelPostStarted = note_post_started;
    return callbacks;
}

static KMCL_BUS bus;
static KMCL_WORKER worker, client_worker;
static PDEVICE_OBJECT device, client_device;

/* Both channels, Disabled, with their callbacks set. `process` may be NULL for a side that takes nothing. */
static inline void make_pair(PFN_VMB_CHANNEL_PROCESS_PACKET process)
{
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS callbacks = noting();
    NEED(KmclLoopbackCreate(1u << 20, &bus) == STATUS_SUCCESS);
    NEED(KmclWorkerCreate("conformance", &worker) == STATUS_SUCCESS);
    NEED(KmclDeviceCreate(bus, worker, &device) == STATUS_SUCCESS);
    NEED(KmclWorkerCreate("guest", &client_worker) == STATUS_SUCCESS);
    NEED(KmclDeviceCreate(bus, client_worker, &client_device) == STATUS_SUCCESS);
    init_side(&server);
    init_side(&client);
    NEED(k.VmbChannelAllocate(device, TRUE, &server.channel) == STATUS_SUCCESS);
    NEED(k.VmbServerChannelInitSetTargetInterfaceId(server.channel, TYPE, INSTANCE) == STATUS_SUCCESS);
    NEED(k.VmbChannelInitSetStateChangeCallbacks(server.channel, &callbacks) == STATUS_SUCCESS);
    if (process != NULL) {
        NEED(k.VmbChannelInitSetProcessPacketCallbacks(server.channel, process, NULL) == STATUS_SUCCESS);
    }
    NEED(k.VmbChannelAllocate(client_device, FALSE, &client.channel) == STATUS_SUCCESS);
    NEED(k.VmbClientChannelInitSetTargetPnp(client.channel, &TYPE, NULL, NULL) == STATUS_SUCCESS);
    NEED(k.VmbChannelInitSetStateChangeCallbacks(client.channel, &callbacks) == STATUS_SUCCESS);
}

/* Callbacks come before the state that they lead to can be seen. */
static inline void await_state(SIDE *side, KMCL_CHANNEL_STATE state)
{
    while (KmclChannelGetState(side->channel) != state) {
        sched_yield();
    }
}

static inline void await_outstanding(UINT32 packets)
{
    while (KmclChannelIncomingOutstanding(server.channel) != packets) {
        sched_yield();
    }
}

/* Enables both, and waits until both are Active. */
static inline void run_pair(void)
{
    NEED(k.VmbChannelEnable(server.channel) == STATUS_SUCCESS);
    k.VmbChannelStart(server.channel);
    NEED(k.VmbChannelEnable(client.channel) == STATUS_SUCCESS);
    await(&server.active);
    await(&client.active);
    await_state(&server, KmclChannelActive);
    await_state(&client, KmclChannelActive);
}

static inline void end_pair(void)
{
    k.VmbChannelDisable(client.channel);
    k.VmbChannelDisable(server.channel);
    k.VmbChannelCleanup(client.channel);
    k.VmbChannelCleanup(server.channel);
    KmclDeviceDelete(device);
    KmclDeviceDelete(client_device);
    KmclClose(worker);
    KmclClose(client_worker);
    KmclClose(bus);
}

/* The end of a sent packet. */
typedef struct SENT {
    sem_t done;
    NTSTATUS status;
    UINT32 length;
    KIRQL irql;
    UCHAR answer[64];
} SENT;

static inline VOID note_sent(VMBPACKET packet, NTSTATUS status, PVOID buffer, UINT32 length)
{
    SENT *sent = (SENT *)k.VmbPacketGetPointer(packet);
    sent->status = status;
    sent->length = length;
    sent->irql = KeGetCurrentIrql();
    if (buffer != NULL) {
        memcpy(sent->answer, buffer, length < sizeof sent->answer ? length : sizeof sent->answer);
    }
    sem_post(&sent->done);
}

/* A packet of `channel` whose end `sent` notes. */
static inline VMBPACKET noted_packet(VMBCHANNEL channel, SENT *sent)
{
    VMBPACKET packet = k.VmbPacketAllocate(channel);
    NEED(packet != NULL);
    memset(sent, 0, sizeof *sent);
    NEED(sem_init(&sent->done, 0, 0) == 0);
    k.VmbPacketSetPointer(packet, sent);
    k.VmbPacketSetCompletionRoutine(packet, note_sent);
    return packet;
}

#define WAIT VMBUS_CHANNEL_FORMAT_FLAG_WAIT_FOR_COMPLETION

#endif /* CHECK_H */
