/* The Init setters: section 4. */
#include "check.h"

static VOID process(VMBCHANNEL channel, VMBPACKETCOMPLETION packet, PVOID buffer, UINT32 length, UINT32 flags)
{
    (void)channel;
    (void)buffer;
    (void)length;
    (void)flags;
    k.VmbChannelPacketComplete(packet, NULL, 0);
}

static NTSTATUS save(VMBCHANNEL channel, VMBPACKET packet, PVOID buffer, UINT32 size, PUINT32 needed)
{
    (void)channel;
    (void)packet;
    (void)buffer;
    (void)size;
    *needed = 0;
    return STATUS_SUCCESS;
}

static NTSTATUS restore(VMBCHANNEL channel, PVOID library, UINT32 library_size, PVOID own, UINT32 own_size)
{
    (void)channel;
    (void)library;
    (void)library_size;
    (void)own;
    (void)own_size;
    return STATUS_SUCCESS;
}

#define P1 STATUS_INVALID_PARAMETER_1
#define P2 STATUS_INVALID_PARAMETER_2
#define P3 STATUS_INVALID_PARAMETER_3
#define OK STATUS_SUCCESS

/* Every setter with good arguments, on either end, in this order. */
static NTSTATUS set(int which, VMBCHANNEL channel)
{
    static const UCHAR user_data[VMBUS_SERVER_CHANNEL_INIT_MAXIMUM_OFFER_DATA];
    static UNICODE_STRING name = RTL_CONSTANT_STRING(u"a name");
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS callbacks = noting();
    switch (which) {
    case 0: return k.VmbChannelInitSetFlags(channel, 0);
    case 1: return k.VmbChannelInitSetFriendlyName(channel, &name);
    case 2: return k.VmbChannelInitSetMaximumPacketSize(channel, 256);
    case 3: return k.VmbChannelInitSetMaximumExternalData(channel, 4096, 1);
    case 4: return k.VmbChannelInitSetClientContextSize(channel, 16);
    case 5: return k.VmbChannelInitSetProcessPacketCallbacks(channel, process, NULL);
    case 6: return k.VmbChannelInitSetStateChangeCallbacks(channel, &callbacks);
    case 7: return k.VmbClientChannelInitSetRingBufferPageCount(channel, 4, 4);
    case 8: return k.VmbClientChannelInitSetTargetPnp(channel, &TYPE, &INSTANCE, NULL);
    case 9: return k.VmbServerChannelInitSetFlags(channel, 0);
    case 10: return k.VmbServerChannelInitSetMmioMegabytes(channel, 0, 1);
    case 11: return k.VmbServerChannelInitSetSaveRestorePacketCallbacks(channel, save, restore);
    case 12: return k.VmbServerChannelInitSetTargetInterfaceId(channel, TYPE, INSTANCE);
    case 13: return k.VmbServerChannelInitSetTargetVtl(channel, 2);
    case 14: return k.VmbServerChannelInitSetVmbusHandle(channel, bus);
    default: return KmclChannelInitSetUserData(channel, user_data);
    }
}

static const char *const NAMES[] = {
    "VmbChannelInitSetFlags", "VmbChannelInitSetFriendlyName", "VmbChannelInitSetMaximumPacketSize",
    "VmbChannelInitSetMaximumExternalData", "VmbChannelInitSetClientContextSize",
    "VmbChannelInitSetProcessPacketCallbacks", "VmbChannelInitSetStateChangeCallbacks",
    "VmbClientChannelInitSetRingBufferPageCount", "VmbClientChannelInitSetTargetPnp",
    "VmbServerChannelInitSetFlags", "VmbServerChannelInitSetMmioMegabytes",
    "VmbServerChannelInitSetSaveRestorePacketCallbacks", "VmbServerChannelInitSetTargetInterfaceId",
    "VmbServerChannelInitSetTargetVtl", "VmbServerChannelInitSetVmbusHandle", "KmclChannelInitSetUserData"};
#define SETTERS 16

int main(void)
{
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS callbacks = noting();
    UNICODE_STRING no_text = {2, 2, NULL};
    HANDLE kernel = NULL;
    VMBCHANNEL s, c;
    int i;

    begin();
    make_pair(process);
    s = server.channel;
    c = client.channel;
    for (i = 0; i < SETTERS; i++) {
        int on_server = i != 7 && i != 8, on_client = i <= 8 || i == 15;
        row(NAMES[i], "D-59-server", set(i, s) == (on_server ? OK : P1), "server", __LINE__);
        row(NAMES[i], "D-59-client", set(i, c) == (on_client ? OK : P1), "client", __LINE__);
        row(NAMES[i], "null-channel", set(i, NULL) == P1, "null", __LINE__);
        row(NAMES[i], "foreign-channel", set(i, (VMBCHANNEL)(void *)&i) == P1, "foreign", __LINE__);
    }
    ROW(VmbChannelInitSetFlags, "undefined-bits", k.VmbChannelInitSetFlags(s, 2) == P2);
    ROW(VmbChannelInitSetFriendlyName, "null", k.VmbChannelInitSetFriendlyName(s, NULL) == P2);
    ROW(VmbChannelInitSetFriendlyName, "null-text", k.VmbChannelInitSetFriendlyName(s, &no_text) == P2);
    ROW(VmbChannelInitSetMaximumPacketSize, "0", k.VmbChannelInitSetMaximumPacketSize(s, 0) == P2);
    ROW(VmbChannelInitSetMaximumPacketSize, "4GiB-1", k.VmbChannelInitSetMaximumPacketSize(s, 0xffffffffu) == P2);
    ROW(VmbChannelInitSetMaximumExternalData, "size-0", k.VmbChannelInitSetMaximumExternalData(s, 0, 1) == P2);
    ROW(VmbChannelInitSetMaximumExternalData, "chain-0", k.VmbChannelInitSetMaximumExternalData(s, 1, 0) == P3);
    ROW(VmbChannelInitSetMaximumExternalData, "4GiB-1", k.VmbChannelInitSetMaximumExternalData(s, 0xffffffffu, 1) == P2 && k.VmbChannelInitSetMaximumExternalData(s, 1, 0xffffffffu) == P3);
    ROW(VmbChannelInitSetClientContextSize, "4GiB-1", k.VmbChannelInitSetClientContextSize(s, 0xffffffffu) == P2);
    ROW(VmbChannelInitSetProcessPacketCallbacks, "null", k.VmbChannelInitSetProcessPacketCallbacks(s, NULL, NULL) == P2);
    ROW(VmbChannelInitSetStateChangeCallbacks, "null", k.VmbChannelInitSetStateChangeCallbacks(s, NULL) == P2);
    callbacks.Version = 2;
    ROW(VmbChannelInitSetStateChangeCallbacks, "version", k.VmbChannelInitSetStateChangeCallbacks(s, &callbacks) == P2);
    callbacks.Version = 1;
    callbacks.Size--;
    ROW(VmbChannelInitSetStateChangeCallbacks, "size", k.VmbChannelInitSetStateChangeCallbacks(s, &callbacks) == P2);
    ROW(VmbClientChannelInitSetRingBufferPageCount, "D-55-incoming-0", k.VmbClientChannelInitSetRingBufferPageCount(c, 0, 4) == P2);
    ROW(VmbClientChannelInitSetRingBufferPageCount, "D-55-outgoing-0", k.VmbClientChannelInitSetRingBufferPageCount(c, 4, 0) == P3);
    ROW(VmbClientChannelInitSetTargetPnp, "null-type", k.VmbClientChannelInitSetTargetPnp(c, NULL, NULL, NULL) == P2);
    ROW(VmbServerChannelInitSetFlags, "all", k.VmbServerChannelInitSetFlags(s, VMBUS_SERVER_CHANNEL_INIT_FLAGS) == OK);
    ROW(VmbServerChannelInitSetFlags, "undefined-bits", k.VmbServerChannelInitSetFlags(s, 0x20) == P2);
    ROW(VmbServerChannelInitSetFlags, "D-67", k.VmbServerChannelInitSetFlags(s, VMBUS_SERVER_CHANNEL_INIT_FLAG_LOOPBACK_OFFER) == OK);
    ROW(VmbServerChannelInitSetMmioMegabytes, "D-53", k.VmbServerChannelInitSetMmioMegabytes(s, 0, 0) == STATUS_INVALID_PARAMETER && k.VmbServerChannelInitSetMmioMegabytes(s, 1, 0) == OK);
    ROW(VmbServerChannelInitSetSaveRestorePacketCallbacks, "D-24-save", k.VmbServerChannelInitSetSaveRestorePacketCallbacks(s, NULL, restore) == P2);
    ROW(VmbServerChannelInitSetSaveRestorePacketCallbacks, "D-24-restore", k.VmbServerChannelInitSetSaveRestorePacketCallbacks(s, save, NULL) == P3);
    ROW(VmbServerChannelInitSetTargetVtl, "D-68", k.VmbServerChannelInitSetTargetVtl(s, 3) == P2 && k.VmbServerChannelInitSetTargetVtl(s, 0) == OK);
    ROW(VmbServerChannelInitSetVmbusHandle, "no-bus", k.VmbServerChannelInitSetVmbusHandle(s, worker) == P2 && k.VmbServerChannelInitSetVmbusHandle(s, NULL) == P2);
    ROW(VmbConvertVmbusHandleToKernelHandle, "page", k.VmbConvertVmbusHandleToKernelHandle(bus, &kernel) == OK && kernel != NULL);
    ROW(VmbServerChannelInitSetVmbusHandle, "kernel-handle", k.VmbServerChannelInitSetVmbusHandle(s, kernel) == OK);
    ZwClose(kernel);
    ROW(VmbConvertVmbusHandleToKernelHandle, "no-handle", k.VmbConvertVmbusHandleToKernelHandle(kernel, &kernel) == STATUS_INVALID_HANDLE);
    ROW(VmbConvertVmbusHandleToKernelHandle, "null-output", k.VmbConvertVmbusHandleToKernelHandle(bus, NULL) == P2);
    ROW(KmclChannelInitSetUserData, "null", KmclChannelInitSetUserData(s, NULL) == P2);
    NEED(k.VmbServerChannelInitSetFlags(s, 0) == OK);

    run_pair();
    for (i = 0; i < SETTERS; i++) {
        row(NAMES[i], "D-1-not-disabled", set(i, s) == P1 && set(i, c) == P1, "enabled", __LINE__);
    }
    ROW(KmclChannelInitSetUserData, "D-1-before-arguments", KmclChannelInitSetUserData(s, NULL) == P1);
    ROW(VmbChannelInitSetProcessPacketCallbacks, "D-1-before-arguments", k.VmbChannelInitSetProcessPacketCallbacks(s, NULL, NULL) == P1);
    end_pair();
    for (i = 0; i < SETTERS; i++) {
        row(NAMES[i], "after-cleanup", set(i, s) == P1 && set(i, c) == P1, "stale", __LINE__);
    }
    return end();
}
