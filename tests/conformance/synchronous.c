/* Synchronous requests: section 10. */
#include "check.h"

static VMBPACKETCOMPLETION held;
static int wants_hold;
static sem_t received;
static NTSTATUS in_post_started, in_started;

static VOID process(VMBCHANNEL channel, VMBPACKETCOMPLETION packet, PVOID buffer, UINT32 length, UINT32 flags)
{
    (void)channel;
    (void)flags;
    if (wants_hold) {
        held = packet;
        sem_post(&received);
    } else {
        k.VmbChannelPacketComplete(packet, buffer, length);
    }
}

static NTSTATUS request(VMBCHANNEL channel, UINT32 flags, PVOID answer, PUINT32 size, LONGLONG *timeout)
{
    static UCHAR message[16] = "a request of 16";
    return k.VmbChannelSendSynchronousRequest(channel, message, sizeof message, NULL, flags, answer, size,
                                              (PLARGE_INTEGER)(void *)timeout);
}

static VOID started(VMBCHANNEL channel)
{
    in_started = request(channel, WAIT, NULL, NULL, NULL);
    note_started(channel);
}

static VOID post_started(VMBCHANNEL channel)
{
    UCHAR answer[16];
    UINT32 size = sizeof answer;
    in_post_started = request(channel, WAIT, answer, &size, NULL);
    note_post_started(channel);
}

int main(void)
{
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS callbacks = noting();
    UCHAR answer[32];
    UINT32 size = sizeof answer;
    LONGLONG none = 0, soon = -10000, past = 1;

    begin();
    NEED(sem_init(&received, 0, 0) == 0);
    make_pair(process);
    callbacks.EvtChannelStarted = started;
    callbacks.EvtChannelPostStarted = post_started;
    NEED(k.VmbChannelInitSetStateChangeCallbacks(client.channel, &callbacks) == STATUS_SUCCESS);
    ROW(VmbChannelSendSynchronousRequest, "disabled", request(client.channel, WAIT, NULL, NULL, NULL) == STATUS_DEVICE_REMOVED);
    run_pair();
    ROW(VmbChannelSendSynchronousRequest, "started", in_started == STATUS_INVALID_DEVICE_STATE);
    ROW(VmbChannelSendSynchronousRequest, "post-started", in_post_started == STATUS_SUCCESS);

    ROW(VmbChannelSendSynchronousRequest, "answer", request(client.channel, WAIT, answer, &size, NULL) == STATUS_SUCCESS && size == 16 && memcmp(answer, "a request of 16", 16) == 0);
    size = 12;
    ROW(VmbChannelSendSynchronousRequest, "D-48-multiple-of-8", request(client.channel, WAIT, answer, &size, NULL) == STATUS_INVALID_PARAMETER_7);
    ROW(VmbChannelSendSynchronousRequest, "D-48-no-size", request(client.channel, WAIT, answer, NULL, NULL) == STATUS_INVALID_PARAMETER_7);
    size = 8;
    memset(answer, 0x55, sizeof answer);
    ROW(VmbChannelSendSynchronousRequest, "D-48-too-small", request(client.channel, WAIT, answer, &size, NULL) == STATUS_BUFFER_TOO_SMALL && size == 16 && answer[0] == 0x55);
    ROW(VmbChannelSendSynchronousRequest, "no-answer-wanted", request(client.channel, WAIT, NULL, NULL, NULL) == STATUS_SUCCESS);
    ROW(VmbChannelSendSynchronousRequest, "without-wait", request(client.channel, 0, NULL, NULL, &none) == STATUS_SUCCESS);
    ROW(VmbChannelSendSynchronousRequest, "undefined-flags", request(client.channel, 8, NULL, NULL, NULL) == STATUS_INVALID_PARAMETER_5);
    ROW(VmbChannelSendSynchronousRequest, "null-channel", request(NULL, WAIT, NULL, NULL, NULL) == STATUS_INVALID_PARAMETER_1);
    ROW(VmbChannelSendSynchronousRequest, "null-buffer", k.VmbChannelSendSynchronousRequest(client.channel, NULL, 8, NULL, WAIT, NULL, NULL, NULL) == STATUS_INVALID_PARAMETER_2);
    ROW(VmbChannelSendSynchronousRequest, "4GiB-1", k.VmbChannelSendSynchronousRequest(client.channel, answer, 0xffffffffu, NULL, WAIT, NULL, NULL, NULL) == STATUS_INVALID_PARAMETER_3);
    ROW(VmbChannelSendSynchronousRequest, "D-48-server-timeout", request(server.channel, 0, NULL, NULL, NULL) == STATUS_INVALID_PARAMETER_8);
    ROW(VmbChannelSendSynchronousRequest, "D-48-server-flag", request(server.channel, WAIT, NULL, NULL, &none) == STATUS_INVALID_PARAMETER_5);

    /* What was sent without waiting is behind the device, once this is answered. */
    NEED(request(client.channel, WAIT, NULL, NULL, NULL) == STATUS_SUCCESS);
    wants_hold = 1;
    ROW(VmbChannelSendSynchronousRequest, "relative-timeout", request(client.channel, WAIT, NULL, NULL, &soon) == STATUS_CANCELLED);
    await(&received);
    k.VmbChannelPacketComplete(held, NULL, 0); /* a late answer is ignored */
    ROW(VmbChannelSendSynchronousRequest, "absolute-timeout", request(client.channel, WAIT, NULL, NULL, &past) == STATUS_CANCELLED);
    await(&received);
    k.VmbChannelPacketComplete(held, NULL, 0);
    ROW(VmbChannelSendSynchronousRequest, "D-49", request(client.channel, WAIT, NULL, NULL, &none) == STATUS_CANCELLED);
    await(&received);
    k.VmbChannelPacketComplete(held, NULL, 0);
    wants_hold = 0;
    size = sizeof answer;
    ROW(VmbChannelSendSynchronousRequest, "goes-on", request(client.channel, WAIT, answer, &size, NULL) == STATUS_SUCCESS && size == 16);
    end_pair();
    return end();
}
