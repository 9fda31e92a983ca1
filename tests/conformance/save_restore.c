/* Save and restore: section 15; and the extension: freezing. */
#include "check.h"

#define PACKETS 4

static VMBPACKETCOMPLETION held[PACKETS];
static int held_count;
static sem_t received;
static SENT sent[PACKETS];
static SENT restored[PACKETS];
static int saves, restores, queries_null, in_order;
static NTSTATUS second_status;
static int overrun;

/* The client keeps what it gets, so that the server's packets stay in flight. */
static VOID keep(VMBCHANNEL channel, VMBPACKETCOMPLETION packet, PVOID buffer, UINT32 length, UINT32 flags)
{
    (void)channel;
    (void)buffer;
    (void)length;
    (void)flags;
    held[held_count++] = packet;
    sem_post(&received);
}

/* Each packet but the first has the number of its SENT as private state. */
static NTSTATUS save_packet(VMBCHANNEL channel, VMBPACKET packet, PVOID buffer, UINT32 size, PUINT32 needed)
{
    SENT *of = (SENT *)k.VmbPacketGetPointer(packet);
    UINT32 number = (UINT32)(of - sent);
    (void)channel;
    *needed = 0;
    if (number == 0) {
        return STATUS_SUCCESS;
    }
    *needed = sizeof number;
    if (size == 0) {
        queries_null += buffer == NULL;
        return STATUS_BUFFER_TOO_SMALL;
    }
    saves++;
    if (overrun) {
        *needed = size + 1;
    }
    memcpy(buffer, &number, sizeof number);
    return second_status;
}

static NTSTATUS restore_packet(VMBCHANNEL channel, PVOID library, UINT32 library_size, PVOID own, UINT32 own_size)
{
    VMBPACKET packet;
    UINT32 number = 0;
    NTSTATUS status;

    if (own_size == 0) {
        in_order += own == NULL; /* D-23 */
    } else {
        memcpy(&number, own, sizeof number);
    }
    packet = noted_packet(channel, &restored[number]);
    status = k.VmbPacketRestore(packet, library, library_size - 1);
    ROW(VmbPacketRestore, "D-28-size", status == STATUS_INVALID_PARAMETER_3);
    status = k.VmbPacketRestore(packet, library, library_size);
    ROW(VmbPacketRestore, "D-28-used", k.VmbPacketRestore(packet, library, library_size) == STATUS_INVALID_PARAMETER_1);
    restores++;
    return status;
}

/* The chunked loop as a driver writes it. Returns the bytes saved, or 0. */
static UINT32 save_all(VMBCHANNEL channel, PUCHAR state, UINT32 room, UINT32 size)
{
    UINT32 total = 0;
    ULONG filled, required;
    NTSTATUS status;

    if (!NT_SUCCESS(k.VmbChannelSaveBegin(channel))) {
        return 0;
    }
    for (;;) {
        NEED(total + size <= room);
        status = k.VmbChannelSaveContinue(channel, state + total, size, &filled, &required);
        if (status == STATUS_SUCCESS) {
            total += filled;
            break;
        }
        if (status == STATUS_BUFFER_OVERFLOW) {
            total += filled;
            size = required > size ? required : size;
        } else if (status == STATUS_BUFFER_TOO_SMALL) {
            NEED(filled == 0 && required > size);
            size = required;
        } else {
            total = 0;
            break;
        }
    }
    k.VmbChannelSaveEnd(channel);
    return total;
}

static VMBCHANNEL another_server(void)
{
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS callbacks = noting();
    VMBCHANNEL channel;
    NEED(k.VmbChannelAllocate(device, TRUE, &channel) == STATUS_SUCCESS);
    NEED(k.VmbServerChannelInitSetTargetInterfaceId(channel, TYPE, INSTANCE) == STATUS_SUCCESS);
    NEED(k.VmbChannelInitSetStateChangeCallbacks(channel, &callbacks) == STATUS_SUCCESS);
    NEED(k.VmbServerChannelInitSetSaveRestorePacketCallbacks(channel, save_packet, restore_packet) == STATUS_SUCCESS);
    return channel;
}

int main(void)
{
    static UCHAR state[65536], again[65536], small[4];
    VMBCHANNEL first, second;
    ULONG filled = 7, required = 7;
    UINT32 bytes;
    int i;

    begin();
    NEED(sem_init(&received, 0, 0) == 0);
    make_pair(NULL);
    NEED(k.VmbServerChannelInitSetSaveRestorePacketCallbacks(server.channel, save_packet, restore_packet) == STATUS_SUCCESS);
    NEED(k.VmbChannelInitSetProcessPacketCallbacks(client.channel, keep, NULL) == STATUS_SUCCESS);
    ROW(VmbChannelSaveBegin, "D-5-disabled", k.VmbChannelSaveBegin(server.channel) == STATUS_INVALID_DEVICE_STATE);
    run_pair();
    ROW(VmbChannelSaveBegin, "D-32-active", k.VmbChannelSaveBegin(server.channel) == STATUS_INVALID_DEVICE_STATE);
    ROW(VmbChannelSaveBegin, "client", k.VmbChannelSaveBegin(client.channel) == STATUS_INVALID_PARAMETER_1);
    ROW(VmbChannelSaveBegin, "null", k.VmbChannelSaveBegin(NULL) == STATUS_INVALID_PARAMETER_1);
    ROW(VmbChannelSaveContinue, "D-17-without-begin", k.VmbChannelSaveContinue(server.channel, state, 100, &filled, &required) == STATUS_INVALID_DEVICE_STATE && filled == 0 && required == 0);
    k.VmbChannelSaveEnd(server.channel); /* D-17: nothing */
    for (i = 0; i < PACKETS; i++) {
        UINT32 number = (UINT32)i;
        VMBPACKET packet = noted_packet(server.channel, &sent[i]);
        NEED(k.VmbPacketSend(packet, &number, sizeof number, NULL, WAIT) == STATUS_SUCCESS);
        await(&received);
    }
    k.VmbChannelPause(server.channel);
    ROW(VmbChannelPause, "D-11-outgoing-stay", sent[0].status == 0 && held_count == PACKETS);

    ROW(VmbChannelSaveEnd, "D-17-without-begin", KmclChannelGetState(server.channel) == KmclChannelPaused);
    ROW(VmbChannelSaveBegin, "page", k.VmbChannelSaveBegin(server.channel) == STATUS_SUCCESS);
    ROW(VmbChannelSaveBegin, "D-17-twice", k.VmbChannelSaveBegin(server.channel) == STATUS_INVALID_DEVICE_STATE);
    filled = required = 7;
    ROW(VmbChannelSaveContinue, "D-16-too-small", k.VmbChannelSaveContinue(server.channel, small, sizeof small, &filled, &required) == STATUS_BUFFER_TOO_SMALL && filled == 0 && required > sizeof small);
    ROW(VmbChannelSaveContinue, "size-0", k.VmbChannelSaveContinue(server.channel, NULL, 0, &filled, &required) == STATUS_BUFFER_TOO_SMALL);
    ROW(VmbChannelSaveContinue, "null-buffer", k.VmbChannelSaveContinue(server.channel, NULL, 8, &filled, &required) == STATUS_INVALID_PARAMETER_2);
    ROW(VmbChannelSaveContinue, "null-outputs", k.VmbChannelSaveContinue(server.channel, state, 8, NULL, &required) == STATUS_INVALID_PARAMETER_4 && k.VmbChannelSaveContinue(server.channel, state, 8, &filled, NULL) == STATUS_INVALID_PARAMETER_5);
    k.VmbChannelSaveEnd(server.channel);

    bytes = save_all(server.channel, state, sizeof state, 16);
    ROW(VmbChannelSaveEnd, "ends", k.VmbChannelSaveContinue(server.channel, again, sizeof again, &filled, &required) == STATUS_INVALID_DEVICE_STATE);
    ROW(VmbChannelSaveContinue, "D-14-loop", bytes != 0);
    ROW(EvtVmbChannelSavePacket, "D-23-query", queries_null == PACKETS - 1);
    ROW(EvtVmbChannelSavePacket, "once-each", saves == PACKETS - 1);
    ROW(VmbChannelSaveContinue, "same-in-one-piece", save_all(server.channel, again, sizeof again, 60000) == bytes && memcmp(state, again, bytes) == 0);
    overrun = 1;
    ROW(VmbChannelSaveContinue, "D-22-overrun", k.VmbChannelSaveBegin(server.channel) == STATUS_SUCCESS && k.VmbChannelSaveContinue(server.channel, again, sizeof again, &filled, &required) == STATUS_INVALID_BUFFER_SIZE && filled == 0);
    k.VmbChannelSaveEnd(server.channel);
    overrun = 0;
    second_status = STATUS_UNSUCCESSFUL;
    ROW(VmbChannelSaveContinue, "D-21-callback-fails", k.VmbChannelSaveBegin(server.channel) == STATUS_SUCCESS && k.VmbChannelSaveContinue(server.channel, again, sizeof again, &filled, &required) == STATUS_UNSUCCESSFUL && filled == 0);
    k.VmbChannelSaveEnd(server.channel);
    second_status = STATUS_SUCCESS;

    /* It goes on elsewhere: here, as another channel of the same bus. */
    ROW(KmclChannelFreeze, "client", KmclChannelFreeze(client.channel) == STATUS_INVALID_DEVICE_STATE);
    ROW(KmclChannelMoveAway, "not-frozen", KmclChannelMoveAway(server.channel) == STATUS_INVALID_DEVICE_STATE);
    ROW(KmclChannelFreeze, "paused", KmclChannelFreeze(server.channel) == STATUS_SUCCESS);
    ROW(KmclChannelFreeze, "twice", KmclChannelFreeze(server.channel) == STATUS_INVALID_DEVICE_STATE);
    ROW(KmclChannelRunning, "none", KmclChannelRunning(server.channel) == 0 && KmclChannelWaitSettled(server.channel, 0));
    ROW(KmclChannelMoveAway, "frozen", KmclChannelMoveAway(server.channel) == STATUS_SUCCESS && KmclChannelGetState(server.channel) == KmclChannelDisabled);
    first = server.channel;
    second = another_server();
    ROW(VmbChannelRestoreFromBuffer, "garbage", k.VmbChannelRestoreFromBuffer(second, "this is no saved state at all!!!", 32) == STATUS_INVALID_PARAMETER_2);
    ROW(VmbChannelRestoreFromBuffer, "null", k.VmbChannelRestoreFromBuffer(second, NULL, 8) == STATUS_INVALID_PARAMETER_2 && k.VmbChannelRestoreFromBuffer(NULL, state, 8) == STATUS_INVALID_PARAMETER_1);
    ROW(VmbChannelRestoreFromBuffer, "D-19-cut", k.VmbChannelRestoreFromBuffer(second, state, bytes - 1) == STATUS_INVALID_PARAMETER_2);
    /* A restore that failed leaves nothing: packets that had come back are cancelled. */
    for (i = 0; i < restores; i++) {
        await(&restored[i].done);
    }
    ROW(VmbChannelRestoreFromBuffer, "all-or-nothing", restores == 0 || restored[0].status == STATUS_CANCELLED);
    NEED(KmclChannelGetState(second) == KmclChannelDisabled);
    restores = in_order = 0;
    init_side(&server);
    server.channel = second;
    NEED(k.VmbChannelEnable(second) == STATUS_SUCCESS);
    ROW(VmbChannelRestoreFromBuffer, "complete", k.VmbChannelRestoreFromBuffer(second, state, bytes) == STATUS_SUCCESS);
    ROW(EvtVmbChannelRestorePacket, "once-each", restores == PACKETS);
    ROW(EvtVmbChannelRestorePacket, "D-23-no-state", in_order == 1);
    k.VmbChannelStart(second);
    await(&server.active);
    for (i = 0; i < PACKETS; i++) {
        UCHAR answer[8] = {(UCHAR)(40 + i)};
        k.VmbChannelPacketComplete(held[i], answer, 8);
        await_moved(&restored[i].done, second);
        ROW(VmbPacketRestore, "in-flight-again", restored[i].status == STATUS_SUCCESS && restored[i].answer[0] == 40 + i);
    }
    /* Nothing in flight: still one restorable state (D-18), and one without its end asks for more. */
    k.VmbChannelPause(second);
    bytes = save_all(second, state, sizeof state, 16);
    ROW(VmbChannelSaveContinue, "D-18-empty", bytes != 0);
    ROW(VmbChannelRestoreFromBuffer, "D-5-open-is-possible", k.VmbChannelRestoreFromBuffer(second, state, bytes) == STATUS_SUCCESS || KmclChannelGetState(second) == KmclChannelPaused);
    k.VmbChannelDisable(client.channel);
    k.VmbChannelDisable(second);
    k.VmbChannelCleanup(first);
    end_pair();
    return end();
}
