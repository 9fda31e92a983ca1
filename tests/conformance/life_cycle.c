/* The life of a channel: sections 3 and 5. */
#include "check.h"

static NTSTATUS pnp_status;
static sem_t pnp_failed;

static VOID pnp_failure(VMBCHANNEL channel, NTSTATUS status)
{
    pnp_status = channel == client.channel ? status : STATUS_SUCCESS;
    sem_post(&pnp_failed);
}

#define LOG(side, expected) (strcmp((side).log, expected) == 0)

static VOID clear(SIDE *side)
{
    while (sem_trywait(&side->active) == 0 || sem_trywait(&side->closed) == 0) {
    }
    memset(side->log, 0, sizeof side->log);
    side->logged = 0;
}

static VOID start_in_callback(VMBCHANNEL channel)
{
    k.VmbChannelPause(channel); /* forbidden: ignored (D-12) */
    k.VmbChannelDisable(channel);
    k.VmbChannelCleanup(channel);
    note_started(channel);
}

int main(void)
{
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS callbacks;
    VMBCHANNEL channel = NULL;
    GUID instance;
    UINT64 address = 1, size = 1;
    UINT16 latency = 7;

    begin();
    make_pair(NULL);
    ROW(VmbChannelAllocate, "null-parent", k.VmbChannelAllocate(NULL, TRUE, &channel) == STATUS_INVALID_PARAMETER_1 && channel == NULL);
    ROW(VmbChannelAllocate, "null-output", k.VmbChannelAllocate(device, TRUE, NULL) == STATUS_INVALID_PARAMETER_3);
    ROW(VmbChannelAllocate, "disabled", KmclChannelGetState(server.channel) == KmclChannelDisabled);

    ROW(VmbChannelGetPointer, "D-51", k.VmbChannelGetPointer(server.channel) == NULL);
    k.VmbChannelSetPointer(server.channel, &server);
    ROW(VmbChannelSetPointer, "page", k.VmbChannelGetPointer(server.channel) == &server);

    callbacks = noting();
    callbacks.EvtChannelStarted = start_in_callback;
    NEED(k.VmbChannelInitSetStateChangeCallbacks(server.channel, &callbacks) == STATUS_SUCCESS);

    ROW(VmbChannelEnable, "server-returns-at-once", k.VmbChannelEnable(server.channel) == STATUS_SUCCESS);
    ROW(VmbChannelEnable, "enabled", KmclChannelGetState(server.channel) == KmclChannelEnabled);
    ROW(VmbChannelEnable, "twice", k.VmbChannelEnable(server.channel) == STATUS_INVALID_DEVICE_STATE);
    ROW(VmbChannelEnable, "client", k.VmbChannelEnable(client.channel) == STATUS_SUCCESS);
    await(&client.active); /* the client is started by Enable alone */
    ROW(VmbChannelEnable, "client-started", LOG(client, "OSP"));
    ROW(VmbChannelStart, "server-explicit", LOG(server, "O"));
    k.VmbChannelStart(server.channel);
    await(&server.active);
    ROW(EvtVmbChannelStarted, "D-2-D-9-order", LOG(server, "OSP"));
    await_state(&server, KmclChannelActive);
    ROW(EvtVmbChannelPostStarted, "D-9-last", LOG(server, "OSP"));
    ROW(VmbChannelPause, "D-12-in-callback", LOG(server, "OSP"));
    ROW(VmbChannelCleanup, "D-12-in-callback", KmclChannelGetState(server.channel) == KmclChannelActive);
    ROW(EvtVmbChannelOpened, "passive-level", server.irql == PASSIVE_LEVEL && client.irql == PASSIVE_LEVEL);

    k.VmbChannelGetInterfaceInstance(client.channel, &instance);
    ROW(VmbChannelGetInterfaceInstance, "bound", memcmp(&instance, &INSTANCE, sizeof instance) == 0);
    k.VmbChannelGetMmioSpace(client.channel, &address, &size);
    ROW(VmbChannelGetMmioSpace, "D-52", address == 0 && size == 0);
    ROW(VmbChannelSetInterruptLatency, "no-monitor", k.VmbChannelSetInterruptLatency(client.channel, 5, &latency) == STATUS_NOT_SUPPORTED && latency == 7);
    ROW(VmbChannelSetInterruptLatency, "null-output", k.VmbChannelSetInterruptLatency(client.channel, 5, NULL) == STATUS_INVALID_PARAMETER_3);
    ROW(VmbChannelSetInterruptLatency, "server", k.VmbChannelSetInterruptLatency(server.channel, 5, &latency) == STATUS_INVALID_DEVICE_STATE);

    clear(&server);
    k.VmbChannelPause(server.channel);
    ROW(EvtVmbChannelSuspend, "D-7-on-the-server", LOG(server, "U"));
    ROW(VmbChannelPause, "D-7-suspend", LOG(server, "U") && KmclChannelGetState(server.channel) == KmclChannelPaused);
    k.VmbChannelStart(server.channel);
    await(&server.active);
    ROW(VmbChannelStart, "D-2", LOG(server, "USP"));

    clear(&server);
    clear(&client);
    k.VmbChannelDisable(client.channel);
    ROW(EvtVmbChannelSuspend, "D-7-on-the-client", LOG(client, "UC"));
    ROW(VmbChannelDisable, "client", LOG(client, "UC") && KmclChannelGetState(client.channel) == KmclChannelDisabled);
    await(&server.closed);
    await_state(&server, KmclChannelClosed);
    ROW(EvtVmbChannelClosed, "guest-closed", LOG(server, "UC"));

    /* The offer stands; the client comes again. */
    clear(&client);
    NEED(k.VmbChannelEnable(client.channel) == STATUS_SUCCESS);
    await(&client.active);
    await(&server.active);
    await_state(&server, KmclChannelActive);
    ROW(VmbChannelEnable, "again", LOG(client, "OSP") && LOG(server, "UCOSP"));

    /* A paused channel is disabled: Suspend was delivered before. */
    k.VmbChannelPause(server.channel);
    clear(&server);
    clear(&client);
    k.VmbChannelDisable(server.channel);
    ROW(VmbChannelDisable, "paused", LOG(server, "C"));
    await(&client.closed);
    ROW(EvtVmbChannelClosed, "rescinded", LOG(client, "UC"));
    k.VmbChannelDisable(client.channel);

    /* Pause on a Disabled channel arms a pause for the next Enable (D-4), of a client too. */
    clear(&server);
    clear(&client);
    k.VmbChannelPause(client.channel);
    NEED(k.VmbChannelEnable(server.channel) == STATUS_SUCCESS);
    k.VmbChannelStart(server.channel);
    NEED(k.VmbChannelEnable(client.channel) == STATUS_SUCCESS);
    await(&server.active);
    await_state(&client, KmclChannelPaused);
    ROW(VmbChannelPause, "D-4", LOG(client, "O"));
    k.VmbChannelStart(client.channel);
    await(&client.active);
    ROW(VmbChannelStart, "D-4", LOG(client, "OSP"));
    k.VmbChannelDisable(client.channel);
    await(&server.closed);
    await_state(&server, KmclChannelClosed);

    /* Opened turns the open down: no further callback (D-3). */
    clear(&server);
    clear(&client);
    server.opened_status = STATUS_UNSUCCESSFUL;
    NEED(sem_init(&pnp_failed, 0, 0) == 0);
    NEED(k.VmbClientChannelInitSetTargetPnp(client.channel, &TYPE, NULL, pnp_failure) == STATUS_SUCCESS);
    NEED(k.VmbChannelEnable(client.channel) == STATUS_SUCCESS);
    await_state(&client, KmclChannelDisabled);
    await(&pnp_failed);
    ROW(EvtVmbChannelPnpFailure, "open-refused", pnp_status == STATUS_UNSUCCESSFUL);
    ROW(EvtVmbChannelOpened, "D-3", LOG(server, "O") && LOG(client, ""));

    server.opened_status = STATUS_SUCCESS;
    end_pair();
    ROW(VmbChannelCleanup, "handle-over", KmclChannelGetState(server.channel) == KmclChannelInvalid);
    ROW(VmbChannelEnable, "after-cleanup", k.VmbChannelEnable(server.channel) == STATUS_INVALID_PARAMETER_1);
    ROW(VmbChannelGetPointer, "after-cleanup", k.VmbChannelGetPointer(server.channel) == NULL);
    return end();
}
