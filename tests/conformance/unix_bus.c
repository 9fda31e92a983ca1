/* An extension: a bus at a Unix socket, without a guest: what is refused, and an empty one that moves. */
#include <stdio.h>

#include "check.h"

static KMCL_BUS served;

static VMBCHANNEL offered(KMCL_BUS on)
{
    VMBCHANNEL channel;
    NEED(KmclDeviceCreate(on, worker, &device) == STATUS_SUCCESS);
    NEED(k.VmbChannelAllocate(device, TRUE, &channel) == STATUS_SUCCESS);
    NEED(k.VmbServerChannelInitSetTargetInterfaceId(channel, TYPE, INSTANCE) == STATUS_SUCCESS);
    NEED(k.VmbChannelEnable(channel) == STATUS_SUCCESS);
    return channel;
}

int main(void)
{
    char folder[] = "/tmp/kmcl-conformance-XXXXXX", at[64], state[64], damaged[64];
    VMBCHANNEL channel, other;
    KMCL_BUS loopback, second = NULL;
    UCHAR own[16] = "own state", back[16];
    UINT32 needed;
    FILE *file;

    begin();
    NEED(mkdtemp(folder) != NULL);
    (void)snprintf(at, sizeof at, "%s/socket", folder);
    (void)snprintf(state, sizeof state, "%s/state", folder);
    (void)snprintf(damaged, sizeof damaged, "%s/damaged", folder);
    NEED(KmclWorkerCreate("conformance", &worker) == STATUS_SUCCESS);
    NEED(KmclLoopbackCreate(1u << 20, &loopback) == STATUS_SUCCESS);
    ROW(KmclUnixBusCreate, "null", KmclUnixBusCreate(NULL, worker, &served) == STATUS_INVALID_PARAMETER_1 && KmclUnixBusCreate("", worker, &served) == STATUS_INVALID_PARAMETER_1);
    ROW(KmclUnixBusCreate, "no-worker", KmclUnixBusCreate(at, NULL, &served) == STATUS_INVALID_PARAMETER_2);
    ROW(KmclUnixBusCreate, "null-output", KmclUnixBusCreate(at, worker, NULL) == STATUS_INVALID_PARAMETER_3);
    ROW(KmclUnixBusCreate, "served", KmclUnixBusCreate(at, worker, &served) == STATUS_SUCCESS);
    ROW(KmclUnixBusCreate, "in-use", KmclUnixBusCreate(at, worker, &second) == STATUS_OBJECT_NAME_COLLISION && second == NULL);
    channel = offered(served);

    ROW(KmclUnixBusHold, "foreign", KmclUnixBusHold(loopback) == STATUS_INVALID_PARAMETER_1 && KmclUnixBusHold(NULL) == STATUS_INVALID_PARAMETER_1);
    ROW(KmclUnixBusSave, "not-held", KmclUnixBusSave(served, &channel, 1, own, sizeof own, state) == STATUS_INVALID_DEVICE_STATE);
    ROW(KmclUnixBusMoveAway, "not-held", KmclUnixBusMoveAway(served) == STATUS_INVALID_DEVICE_STATE);
    ROW(KmclUnixBusGetDeviceState, "not-restoring", KmclUnixBusGetDeviceState(served, back, sizeof back, &needed) == STATUS_INVALID_DEVICE_STATE);
    ROW(KmclUnixBusFinishRestore, "not-restoring", KmclUnixBusFinishRestore(served, 0) == STATUS_INVALID_DEVICE_STATE);
    ROW(KmclUnixBusHold, "held", KmclUnixBusHold(served) == STATUS_SUCCESS);
    ROW(KmclUnixBusHold, "twice", KmclUnixBusHold(served) == STATUS_INVALID_DEVICE_STATE);
    ROW(KmclUnixBusSave, "not-frozen", KmclUnixBusSave(served, &channel, 1, own, sizeof own, state) == STATUS_INVALID_DEVICE_STATE);
    NEED(KmclChannelFreeze(channel) == STATUS_SUCCESS && KmclChannelWaitSettled(channel, 1000));
    ROW(KmclUnixBusSave, "null-channels", KmclUnixBusSave(served, NULL, 1, own, sizeof own, state) == STATUS_INVALID_PARAMETER_2);
    other = NULL;
    ROW(KmclUnixBusSave, "null-channel", KmclUnixBusSave(served, &other, 1, own, sizeof own, state) == STATUS_INVALID_PARAMETER_2);
    ROW(KmclUnixBusSave, "null-state", KmclUnixBusSave(served, &channel, 1, NULL, 1, state) == STATUS_INVALID_PARAMETER_4);
    ROW(KmclUnixBusSave, "4GiB-1", KmclUnixBusSave(served, &channel, 0xffffffffu, own, sizeof own, state) == STATUS_INVALID_PARAMETER_2);
    ROW(KmclUnixBusSave, "null-path", KmclUnixBusSave(served, &channel, 1, own, sizeof own, NULL) == STATUS_INVALID_PARAMETER_6);
    ROW(KmclUnixBusSave, "no-folder", KmclUnixBusSave(served, &channel, 1, own, sizeof own, "/nowhere/at/all") == STATUS_UNSUCCESSFUL);
    ROW(KmclUnixBusSave, "saved", KmclUnixBusSave(served, &channel, 1, own, sizeof own, state) == STATUS_SUCCESS);
    KmclUnixBusRelease(served);
    KmclChannelThaw(channel);
    ROW(KmclUnixBusRelease, "goes-on", KmclUnixBusHold(served) == STATUS_SUCCESS);
    NEED(KmclChannelFreeze(channel) == STATUS_SUCCESS && KmclChannelWaitSettled(channel, 1000));
    NEED(KmclUnixBusSave(served, &channel, 1, own, sizeof own, state) == STATUS_SUCCESS);
    NEED(KmclChannelMoveAway(channel) == STATUS_SUCCESS);
    ROW(KmclUnixBusMoveAway, "held", KmclUnixBusMoveAway(served) == STATUS_SUCCESS);
    ROW(KmclUnixBusHold, "gone", KmclUnixBusHold(served) == STATUS_INVALID_DEVICE_STATE);
    k.VmbChannelCleanup(channel);
    KmclDeviceDelete(device);
    KmclClose(served);
    ROW(KmclUnixBusHold, "closed", KmclUnixBusHold(served) == STATUS_INVALID_PARAMETER_1);

    NEED((file = fopen(damaged, "wb")) != NULL && fputs("nothing of the kind", file) >= 0 && fclose(file) == 0);
    ROW(KmclUnixBusRestore, "null", KmclUnixBusRestore(NULL, state, worker, &served) == STATUS_INVALID_PARAMETER_1 && KmclUnixBusRestore(at, NULL, worker, &served) == STATUS_INVALID_PARAMETER_2 && KmclUnixBusRestore(at, state, NULL, &served) == STATUS_INVALID_PARAMETER_3 && KmclUnixBusRestore(at, state, worker, NULL) == STATUS_INVALID_PARAMETER_4);
    ROW(KmclUnixBusRestore, "no-file", KmclUnixBusRestore(at, at, worker, &served) == STATUS_UNSUCCESSFUL);
    ROW(KmclUnixBusRestore, "damaged", KmclUnixBusRestore(at, damaged, worker, &served) == STATUS_INVALID_PARAMETER_2);
    ROW(KmclUnixBusRestore, "restoring", KmclUnixBusRestore(at, state, worker, &served) == STATUS_SUCCESS);
    ROW(KmclUnixBusHold, "restoring", KmclUnixBusHold(served) == STATUS_INVALID_DEVICE_STATE);
    ROW(KmclUnixBusGetDeviceState, "too-small", KmclUnixBusGetDeviceState(served, back, 4, &needed) == STATUS_BUFFER_TOO_SMALL && needed == sizeof own);
    ROW(KmclUnixBusGetDeviceState, "null", KmclUnixBusGetDeviceState(served, NULL, 4, &needed) == STATUS_INVALID_PARAMETER_2 && KmclUnixBusGetDeviceState(served, back, sizeof back, NULL) == STATUS_INVALID_PARAMETER_4);
    ROW(KmclUnixBusGetDeviceState, "same", KmclUnixBusGetDeviceState(served, back, sizeof back, &needed) == STATUS_SUCCESS && memcmp(back, own, sizeof own) == 0);
    ROW(KmclUnixBusFinishRestore, "not-all-channels", KmclUnixBusFinishRestore(served, 0) == STATUS_DEVICE_NOT_READY);
    channel = offered(served);
    ROW(KmclUnixBusRestoreChannel, "no-such", KmclUnixBusRestoreChannel(served, 1, channel) == STATUS_INVALID_PARAMETER_2 && KmclUnixBusRestoreChannel(served, 0, NULL) == STATUS_INVALID_PARAMETER_3);
    ROW(KmclUnixBusRestoreChannel, "restored", KmclUnixBusRestoreChannel(served, 0, channel) == STATUS_SUCCESS);
    ROW(KmclUnixBusRestoreChannel, "twice", KmclUnixBusRestoreChannel(served, 0, channel) == STATUS_ALREADY_COMMITTED);
    ROW(KmclUnixBusFinishRestore, "finished", KmclUnixBusFinishRestore(served, 1000) == STATUS_SUCCESS);
    ROW(KmclChannelIsResumed, "not-open", !KmclChannelIsResumed(channel));
    k.VmbChannelStart(channel);
    k.VmbChannelDisable(channel);
    k.VmbChannelCleanup(channel);
    KmclDeviceDelete(device);
    KmclClose(served);
    KmclClose(loopback);
    KmclClose(worker);
    (void)remove(state);
    (void)remove(damaged);
    (void)remove(at);
    NEED(remove(folder) == 0);
    return end();
}
