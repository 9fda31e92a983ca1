/* What no status reports: with the verifier on, the process ends with function, argument and rule. */
#include <sys/wait.h>

#include "check.h"

static VMBPACKETCOMPLETION kept;
static sem_t received;
static int block_in_callback;

static VOID process(VMBCHANNEL channel, VMBPACKETCOMPLETION packet, PVOID buffer, UINT32 length, UINT32 flags)
{
    (void)buffer;
    (void)length;
    (void)flags;
    kept = packet;
    if (block_in_callback) {
        k.VmbChannelPause(channel);
    }
    k.VmbChannelPacketComplete(packet, NULL, 0);
    sem_post(&received);
}

static VOID start_there(VMBCHANNEL channel)
{
    k.VmbChannelStart(channel);
}

static void send_one(void)
{
    VMBPACKET packet = k.VmbPacketAllocate(client.channel);
    NEED(k.VmbPacketSend(packet, "message", 8, NULL, 0) == STATUS_SUCCESS);
    await(&received);
}

/* Each breaks one rule. */
static void broken(int which)
{
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS callbacks = noting();
    VMBPACKET packet;
    INTERFACE *head = (PINTERFACE)(void *)&k;

    if (which >= 4) {
        NEED(sem_init(&received, 0, 0) == 0);
        make_pair(process);
    }
    (void)KmclSetVerifier(TRUE);
    switch (which) {
    case 0: k.VmbChannelStart(NULL); break;
    case 1: (void)k.VmbChannelEnable((VMBCHANNEL)(void *)&which); break;
    case 2: k.VmbPacketFree(NULL); break;
    case 3: head->InterfaceDereference(NULL); head->InterfaceDereference(NULL); break;
    case 4: run_pair(); send_one(); k.VmbChannelPacketComplete(kept, NULL, 0); break;
    case 5: packet = k.VmbPacketAllocate(client.channel); k.VmbPacketFree(packet); k.VmbPacketFree(packet); break;
    case 6: run_pair(); k.VmbChannelCleanup(server.channel); break;
    case 7: k.VmbChannelSetTransactionQuota(server.channel, 0); break;
    case 8: block_in_callback = 1; run_pair(); send_one(); break;
    case 9:
        callbacks.EvtChannelStarted = start_there;
        NEED(k.VmbChannelInitSetStateChangeCallbacks(server.channel, &callbacks) == STATUS_SUCCESS);
        run_pair();
        break;
    case 10: k.VmbChannelCleanup(server.channel); (void)k.VmbChannelGetPointer(server.channel); break;
    default: k.VmbChannelUnmapGpadl(server.channel, 1); break;
    }
}

static const struct {
    const char *function, *rule, *message;
} EXPECTED[] = {
    {"VmbChannelStart", "null", "VmbChannelStart: Channel names no channel"},
    {"VmbChannelEnable", "foreign", "VmbChannelEnable: Channel names no channel"},
    {"VmbPacketFree", "null", "VmbPacketFree: PacketObject names no packet"},
    {"InterfaceDereference", "too-often", "InterfaceDereference: Context has no reference left"},
    {"VmbChannelPacketComplete", "twice", "VmbChannelPacketComplete: PacketCompletionContext names no packet"},
    {"VmbPacketFree", "twice", "VmbPacketFree: PacketObject names no packet"},
    {"VmbChannelCleanup", "D-12", "VmbChannelCleanup: Channel must be Disabled"},
    {"VmbChannelSetTransactionQuota", "D-61", "VmbChannelSetTransactionQuota: Quota must be greater than 0"},
    {"VmbChannelPause", "D-13", "VmbChannelPause: the caller is at DISPATCH_LEVEL"},
    {"VmbChannelStart", "D-12", "VmbChannelStart: Channel must not be called in a state-change callback"},
    {"VmbChannelGetPointer", "stale", "VmbChannelGetPointer: Channel names no channel"},
    {"VmbChannelUnmapGpadl", "not-mapped", "VmbChannelUnmapGpadl: GpadlHandle names no GPADL"},
};

int main(void)
{
    int which;
    begin();
    for (which = 0; which < (int)(sizeof EXPECTED / sizeof *EXPECTED); which++) {
        char said[512] = "";
        size_t length = 0;
        ssize_t got;
        int out[2], status;
        pid_t child;

        NEED(pipe(out) == 0);
        fflush(stdout);
        child = fork();
        NEED(child >= 0);
        if (child == 0) {
            NEED(dup2(out[1], 2) == 2);
            close(out[0]);
            broken(which);
            _exit(3);
        }
        close(out[1]);
        while (length + 1 < sizeof said && (got = read(out[0], said + length, sizeof said - 1 - length)) > 0) {
            length += (size_t)got;
        }
        close(out[0]);
        NEED(waitpid(child, &status, 0) == child);
        row(EXPECTED[which].function, EXPECTED[which].rule,
            WIFSIGNALED(status) && WTERMSIG(status) == 6 && strstr(said, EXPECTED[which].message) != NULL, said, which);
    }
    return end();
}
