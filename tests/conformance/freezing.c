/* An extension: a channel is saved with requests of its device in flight, and its device restored. */
#include "check.h"

static VMBPACKETCOMPLETION held[4];
static int held_count, frozen_calls, thawed_calls, resumed;
static sem_t received;
static char resumed_state[64];
static KMCL_FENCE fences[4];

static VOID process(VMBCHANNEL channel, VMBPACKETCOMPLETION packet, PVOID buffer, UINT32 length, UINT32 flags)
{
    (void)channel;
    (void)buffer;
    (void)length;
    (void)flags;
    held[held_count++] = packet;
    sem_post(&received);
}

static VOID freeze(VMBCHANNEL channel)
{
    (void)channel;
    frozen_calls++;
    /* The first has finished; the others are settled. */
    k.VmbChannelPacketComplete(held[0], "finished", 8);
    NEED(KmclPacketHandOver(held[1], KmclFenceNeverStarted, NULL, 0) == STATUS_SUCCESS);
}

static VOID thaw(VMBCHANNEL channel)
{
    (void)channel;
    thawed_calls++;
}

static VOID resume(VMBCHANNEL channel, VMBPACKETCOMPLETION packet, PVOID buffer, UINT32 length, UINT32 flags,
                   KMCL_FENCE fence, PVOID device_state, UINT32 size)
{
    (void)channel;
    (void)flags;
    fences[resumed] = fence;
    if (size != 0) {
        memcpy(resumed_state, device_state, size);
    }
    resumed++;
    k.VmbChannelPacketComplete(packet, buffer, length);
}

static VMBCHANNEL make_server(void)
{
    KMCL_FREEZE_CALLBACKS callbacks = {sizeof callbacks, freeze, thaw, resume};
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS noted = noting();
    VMBCHANNEL channel;
    NEED(k.VmbChannelAllocate(device, TRUE, &channel) == STATUS_SUCCESS);
    NEED(k.VmbServerChannelInitSetTargetInterfaceId(channel, TYPE, INSTANCE) == STATUS_SUCCESS);
    NEED(k.VmbChannelInitSetStateChangeCallbacks(channel, &noted) == STATUS_SUCCESS);
    NEED(KmclChannelInitSetFreezeCallbacks(channel, &callbacks) == STATUS_SUCCESS);
    NEED(k.VmbChannelInitSetProcessPacketCallbacks(channel, process, NULL) == STATUS_SUCCESS);
    return channel;
}

int main(void)
{
    static UCHAR state[65536];
    KMCL_FREEZE_CALLBACKS wrong = {4, NULL, NULL, NULL};
    ULONG filled, required;
    SENT sent[3];
    VMBCHANNEL first;
    int i;

    begin();
    NEED(sem_init(&received, 0, 0) == 0);
    make_pair(process);
    ROW(KmclChannelInitSetFreezeCallbacks, "size", KmclChannelInitSetFreezeCallbacks(server.channel, &wrong) == STATUS_INVALID_PARAMETER_2);
    first = server.channel;
    k.VmbChannelCleanup(first);
    server.channel = make_server();
    run_pair();
    /* A thaw: as if nothing had happened. */
    for (i = 0; i < 2; i++) {
        UINT64 message = (UINT64)(10 + i);
        VMBPACKET packet = noted_packet(client.channel, &sent[i]);
        NEED(k.VmbPacketSend(packet, &message, sizeof message, NULL, WAIT) == STATUS_SUCCESS);
        await(&received);
    }
    NEED(KmclChannelFreeze(server.channel) == STATUS_SUCCESS);
    KmclChannelThaw(server.channel);
    KmclChannelThaw(server.channel); /* not frozen: ignored */
    await(&sent[0].done);
    await(&sent[1].done);
    ROW(KmclChannelThaw, "goes-on", thawed_calls == 1 && memcmp(sent[0].answer, "finished", 8) == 0 && sent[1].answer[0] == 11);
    ROW(KmclPacketHandOver, "comes-again", resumed == 1 && fences[0] == KmclFenceNeverStarted);
    held_count = frozen_calls = resumed = 0;

    for (i = 0; i < 3; i++) {
        UINT64 message = (UINT64)i;
        VMBPACKET packet = noted_packet(client.channel, &sent[i]);
        NEED(k.VmbPacketSend(packet, &message, sizeof message, NULL, WAIT) == STATUS_SUCCESS);
        await(&received);
    }
    ROW(KmclPacketHandOver, "not-frozen", KmclPacketHandOver(held[2], KmclFenceCancelled, NULL, 0) == STATUS_INVALID_DEVICE_STATE);
    ROW(KmclPacketHandOver, "no-fence", KmclPacketHandOver(held[2], (KMCL_FENCE)2, NULL, 0) == STATUS_INVALID_PARAMETER_2);
    ROW(KmclPacketHandOver, "null-state", KmclPacketHandOver(held[2], KmclFenceCancelled, NULL, 8) == STATUS_INVALID_PARAMETER_3);
    ROW(KmclChannelFreeze, "page", KmclChannelFreeze(server.channel) == STATUS_SUCCESS && frozen_calls == 1);
    ROW(KmclChannelRunning, "one", KmclChannelRunning(server.channel) == 1 && !KmclChannelWaitSettled(server.channel, 0));
    ROW(VmbChannelSaveBegin, "running", k.VmbChannelSaveBegin(server.channel) == STATUS_DEVICE_BUSY);
    ROW(KmclPacketHandOver, "with-state", KmclPacketHandOver(held[2], KmclFenceCancelled, "sector 7", 9) == STATUS_SUCCESS);
    ROW(KmclPacketHandOver, "over", KmclPacketHandOver(held[2], KmclFenceCancelled, NULL, 0) == STATUS_INVALID_PARAMETER_1);
    ROW(KmclChannelWaitSettled, "settled", KmclChannelWaitSettled(server.channel, 1000));
    ROW(VmbChannelSaveBegin, "frozen", k.VmbChannelSaveBegin(server.channel) == STATUS_SUCCESS);
    ROW(VmbChannelSaveContinue, "frozen", k.VmbChannelSaveContinue(server.channel, state, sizeof state, &filled, &required) == STATUS_SUCCESS);
    k.VmbChannelSaveEnd(server.channel);
    ROW(VmbChannelPacketComplete, "held-while-frozen", sem_trywait(&sent[0].done) != 0);
    NEED(KmclChannelMoveAway(server.channel) == STATUS_SUCCESS);
    k.VmbChannelCleanup(server.channel);

    init_side(&server);
    server.channel = make_server();
    NEED(k.VmbChannelEnable(server.channel) == STATUS_SUCCESS);
    ROW(VmbChannelRestoreFromBuffer, "with-incoming", k.VmbChannelRestoreFromBuffer(server.channel, state, filled) == STATUS_SUCCESS);
    k.VmbChannelStart(server.channel);
    for (i = 0; i < 3; i++) {
        await_moved(&sent[i].done, server.channel);
    }
    ROW(VmbChannelPacketComplete, "saved-as-finished", sent[0].status == STATUS_SUCCESS && memcmp(sent[0].answer, "finished", 8) == 0);
    ROW(KmclPacketHandOver, "resumed", resumed == 2 && fences[0] == KmclFenceNeverStarted && fences[1] == KmclFenceCancelled && strcmp(resumed_state, "sector 7") == 0);
    ROW(KmclPacketHandOver, "answered", sent[1].answer[0] == 1 && sent[2].answer[0] == 2);
    await(&server.active);

    end_pair();
    return end();
}
