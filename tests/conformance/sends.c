/* Packet objects, sends and their completions: sections 7, 8 and 9. */
#include "check.h"

static sem_t received;
static int wants_hold;
static VMBPACKETCOMPLETION held;

static VOID process(VMBCHANNEL channel, VMBPACKETCOMPLETION packet, PVOID buffer, UINT32 length, UINT32 flags)
{
    (void)channel;
    (void)flags;
    if (wants_hold) {
        held = packet;
    } else {
        k.VmbChannelPacketComplete(packet, buffer, length);
    }
    sem_post(&received);
}

static VOID send_again(VMBPACKET packet, NTSTATUS status, PVOID buffer, UINT32 length)
{
    SENT *sent = (SENT *)k.VmbPacketGetPointer(packet);
    (void)buffer;
    (void)length;
    if (sent->length++ < 3) {
        sent->status = k.VmbPacketSend(packet, sent->answer, 8, NULL, WAIT);
        return;
    }
    sent->status = status;
    k.VmbPacketFree(packet);
    sem_post(&sent->done);
}

int main(void)
{
    SENT sent;
    VMBPACKET packet, own;
    UCHAR message[8] = "message";
    PFN_NUMBER pfns[2] = {0, 0};
    PVOID pages;
    PMDL mdl;
    UINT32 size;

    begin();
    NEED(sem_init(&received, 0, 0) == 0);
    make_pair(process);
    NEED(k.VmbChannelInitSetMaximumPacketSize(server.channel, 64) == STATUS_SUCCESS);
    NEED(k.VmbChannelInitSetMaximumPacketSize(client.channel, 64) == STATUS_SUCCESS);
    NEED(k.VmbChannelInitSetMaximumExternalData(server.channel, 65536, 4) == STATUS_SUCCESS);
    NEED(k.VmbChannelInitSetMaximumExternalData(client.channel, 8192, 2) == STATUS_SUCCESS);

    packet = noted_packet(client.channel, &sent);
    ROW(VmbPacketAllocate, "page", packet != NULL && (ULONG_PTR)packet >> 63 == 1);
    ROW(VmbPacketAllocate, "null-channel", k.VmbPacketAllocate(NULL) == NULL);
    ROW(VmbPacketGetChannel, "page", k.VmbPacketGetChannel(packet) == client.channel);
    ROW(VmbPacketSetPointer, "page", (k.VmbPacketSetPointer(packet, NULL), k.VmbPacketGetPointer(packet) == NULL));
    k.VmbPacketSetPointer(packet, &sent);
    ROW(VmbPacketGetPointer, "page", k.VmbPacketGetPointer(packet) == &sent);
    ROW(VmbPacketSend, "D-33-disabled", k.VmbPacketSend(packet, message, 8, NULL, 0) == STATUS_DEVICE_REMOVED);
    ROW(VmbPacketSend, "D-33-disabled-4GiB-1", k.VmbPacketSend(packet, message, 0xffffffffu, NULL, 0) == STATUS_DEVICE_REMOVED);
    ROW(VmbPacketSend, "still-the-drivers", k.VmbPacketGetChannel(packet) == client.channel);
    k.VmbPacketFree(packet);
    ROW(VmbPacketFree, "over", k.VmbPacketGetChannel(packet) == NULL && k.VmbPacketGetPointer(packet) == NULL);
    k.VmbPacketFree(packet); /* twice: nothing */
    k.VmbPacketFree(NULL);
    k.VmbPacketFree((VMBPACKET)(void *)client.channel);
    k.VmbPacketSetPointer(packet, &sent);
    ROW(VmbPacketSend, "freed", k.VmbPacketSend(packet, message, 8, NULL, 0) == STATUS_INVALID_PARAMETER_1);
    ROW(VmbPacketSend, "null", k.VmbPacketSend(NULL, message, 8, NULL, 0) == STATUS_INVALID_PARAMETER_1);

    /* Queued before the opening, sent at it. */
    NEED(k.VmbChannelEnable(client.channel) == STATUS_SUCCESS);
    packet = noted_packet(client.channel, &sent);
    ROW(VmbPacketSend, "queued-before-opened", k.VmbPacketSend(packet, message, 8, NULL, WAIT) == STATUS_SUCCESS && sent.status == 0);
    ROW(VmbPacketSend, "in-flight", k.VmbPacketSend(packet, message, 8, NULL, WAIT) == STATUS_INVALID_PARAMETER_1);
    k.VmbPacketFree(packet); /* in flight: ignored (D-50) */
    NEED(k.VmbChannelEnable(server.channel) == STATUS_SUCCESS);
    k.VmbChannelStart(server.channel);
    await(&sent.done);
    ROW(EvtVmbPacketCompletionRoutine, "answer", sent.status == STATUS_SUCCESS && sent.length == 8 && memcmp(sent.answer, message, 8) == 0);
    ROW(EvtVmbPacketCompletionRoutine, "dispatch-level", sent.irql == DISPATCH_LEVEL);
    ROW(VmbPacketFree, "D-50-in-flight", k.VmbPacketGetChannel(packet) == client.channel);
    await(&server.active);
    await(&client.active);

    /* Without the flag a packet is complete when it is in the ring. */
    ROW(VmbPacketSend, "again", k.VmbPacketSend(packet, message, 8, NULL, 0) == STATUS_SUCCESS);
    await(&sent.done);
    ROW(EvtVmbPacketCompletionRoutine, "in-the-ring", sent.status == STATUS_SUCCESS && sent.length == 0);
    ROW(VmbPacketSend, "D-33-length", k.VmbPacketSend(packet, message, 65, NULL, 0) == STATUS_INVALID_PARAMETER_3);
    ROW(VmbPacketSend, "D-33-length-4GiB-1", k.VmbPacketSend(packet, message, 0xffffffffu, NULL, 0) == STATUS_INVALID_PARAMETER_3);
    ROW(VmbPacketSend, "D-33-flags", k.VmbPacketSend(packet, message, 8, NULL, 8) == STATUS_INVALID_PARAMETER_5);
    ROW(VmbPacketSend, "null-buffer", k.VmbPacketSend(packet, NULL, 8, NULL, 0) == STATUS_INVALID_PARAMETER_2);
    ROW(VmbPacketSend, "length-0", k.VmbPacketSend(packet, NULL, 0, NULL, WAIT) == STATUS_SUCCESS);
    await(&sent.done);

    NEED(KmclChannelAllocatePages(client.channel, 2, &pages) == STATUS_SUCCESS);
    mdl = IoAllocateMdl(pages, 2 * PAGE_SIZE, FALSE, FALSE, NULL);
    NEED(mdl != NULL);
    ROW(VmbPacketSend, "mdl-not-locked", k.VmbPacketSend(packet, message, 8, mdl, WAIT) == STATUS_INVALID_PARAMETER_4);
    MmBuildMdlForNonPagedPool(mdl);
    ROW(VmbPacketSendWithExternalMdl, "D-35", k.VmbPacketSendWithExternalMdl(packet, message, 8, mdl, 0, 0, 0) == STATUS_INVALID_PARAMETER_7);
    ROW(VmbPacketSendWithExternalMdl, "null-mdl", k.VmbPacketSendWithExternalMdl(packet, message, 8, NULL, 0, 0, WAIT) == STATUS_INVALID_PARAMETER_4);
    ROW(VmbPacketSendWithExternalMdl, "offset", k.VmbPacketSendWithExternalMdl(packet, message, 8, mdl, 8192, 0, WAIT) == STATUS_INVALID_PARAMETER_5);
    ROW(VmbPacketSendWithExternalMdl, "length", k.VmbPacketSendWithExternalMdl(packet, message, 8, mdl, 1, 8192, WAIT) == STATUS_INVALID_PARAMETER_6);
    ROW(VmbPacketSendWithExternalMdl, "sent", k.VmbPacketSendWithExternalMdl(packet, message, 8, mdl, 8, 100, WAIT) == STATUS_SUCCESS);
    await(&sent.done);
    pfns[0] = MmGetMdlPfnArray(mdl)[0];
    pfns[1] = MmGetMdlPfnArray(mdl)[1];
    ROW(VmbPacketSendWithExternalPfns, "D-35", k.VmbPacketSendWithExternalPfns(packet, message, 8, pfns, 2, 0) == STATUS_INVALID_PARAMETER_6);
    ROW(VmbPacketSendWithExternalPfns, "D-39", k.VmbPacketSendWithExternalPfns(packet, message, 8, pfns, 0, WAIT) == STATUS_INVALID_PARAMETER_5);
    ROW(VmbPacketSendWithExternalPfns, "null-pfns", k.VmbPacketSendWithExternalPfns(packet, message, 8, NULL, 2, WAIT) == STATUS_INVALID_PARAMETER_4);
    ROW(VmbPacketSendWithExternalPfns, "4GiB-1", k.VmbPacketSendWithExternalPfns(packet, message, 8, pfns, 0xffffffffu, WAIT) == STATUS_INVALID_PARAMETER_4);
    ROW(VmbPacketSendWithExternalPfns, "D-38-sent", k.VmbPacketSendWithExternalPfns(packet, message, 8, pfns, 2, WAIT) == STATUS_SUCCESS);
    await(&sent.done);
    IoFreeMdl(mdl);
    mdl = IoAllocateMdl(pages, 2 * PAGE_SIZE, FALSE, FALSE, NULL);
    NEED(mdl != NULL);
    MmBuildMdlForNonPagedPool(mdl);
    mdl->Next = mdl; /* a chain without an end is refused, not followed */
    ROW(VmbPacketSend, "endless-chain", k.VmbPacketSend(packet, message, 8, mdl, WAIT) == STATUS_INVALID_PARAMETER_4);
    mdl->Next = NULL;
    {
        SENT of_server;
        VMBPACKET to_client = noted_packet(server.channel, &of_server);
        ROW(VmbPacketSend, "D-41", k.VmbPacketSend(to_client, message, 8, mdl, WAIT) == STATUS_NOT_SUPPORTED);
        k.VmbPacketFree(to_client);
    }
    IoFreeMdl(mdl);

    /* A packet in the driver's own memory. */
    size = k.VmbChannelSizeofPacket(client.channel);
    ROW(VmbChannelSizeofPacket, "D-37", size > 64 + sizeof(void *));
    own = (VMBPACKET)malloc(size);
    NEED(own != NULL);
    ROW(VmbPacketInitialize, "D-37-too-small", k.VmbPacketInitialize(client.channel, own, size - 1) == STATUS_INVALID_PARAMETER_3);
    ROW(VmbPacketInitialize, "null", k.VmbPacketInitialize(client.channel, NULL, size) == STATUS_INVALID_PARAMETER_2);
    ROW(VmbPacketInitialize, "null-channel", k.VmbPacketInitialize(NULL, own, size) == STATUS_INVALID_PARAMETER_1);
    ROW(VmbPacketInitialize, "page", k.VmbPacketInitialize(client.channel, own, size) == STATUS_SUCCESS);
    ROW(VmbPacketSend, "no-routine-yet", k.VmbPacketSend(own, message, 8, NULL, WAIT) == STATUS_INVALID_PARAMETER_1);
    k.VmbPacketSetPointer(own, &sent);
    k.VmbPacketSetCompletionRoutine(own, note_sent);
    ROW(VmbPacketSetCompletionRoutine, "null-changes-nothing", (k.VmbPacketSetCompletionRoutine(own, NULL), 1));
    ROW(VmbPacketSend, "own-memory", k.VmbPacketSend(own, message, 8, NULL, WAIT) == STATUS_SUCCESS);
    await(&sent.done);
    k.VmbPacketFree(own); /* forbidden: ignored (D-50) */
    ROW(VmbPacketFree, "D-50-own-memory", k.VmbPacketGetChannel(own) == client.channel);
    ROW(VmbPacketInitialize, "again", k.VmbPacketInitialize(client.channel, own, size) == STATUS_SUCCESS && k.VmbPacketGetPointer(own) == NULL);
    {
        UCHAR copy[64];
        memcpy(copy, own, sizeof copy);
        ROW(VmbPacketGetChannel, "copied-memory", k.VmbPacketGetChannel((VMBPACKET)(void *)copy) == NULL);
    }

    /* The default routine frees; one's own may send again, and free. */
    {
        VMBPACKET forgotten = k.VmbPacketAllocate(client.channel);
        while (sem_trywait(&received) == 0) {
        }
        NEED(k.VmbPacketSend(forgotten, message, 8, NULL, 0) == STATUS_SUCCESS);
        await(&received);
        ROW(VmbPacketAllocate, "default-routine-frees", k.VmbPacketGetChannel(forgotten) == NULL);
    }
    sent.length = 0;
    k.VmbPacketSetCompletionRoutine(packet, send_again);
    NEED(k.VmbPacketSend(packet, message, 8, NULL, WAIT) == STATUS_SUCCESS);
    await(&sent.done);
    ROW(VmbPacketSetCompletionRoutine, "another-routine", sent.length == 4);
    ROW(EvtVmbPacketCompletionRoutine, "sends-again-and-frees", sent.status == STATUS_SUCCESS && sent.length == 4 && k.VmbPacketGetChannel(packet) == NULL);

    /* A packet in flight ends when the channel goes down. */
    packet = noted_packet(client.channel, &sent);
    while (sem_trywait(&received) == 0) {
    }
    wants_hold = 1;
    NEED(k.VmbPacketSend(packet, message, 8, NULL, WAIT) == STATUS_SUCCESS);
    await(&received);
    k.VmbChannelDisable(client.channel);
    await(&sent.done);
    ROW(EvtVmbPacketCompletionRoutine, "D-34-cancelled", sent.status == STATUS_CANCELLED);
    k.VmbChannelPacketComplete(held, NULL, 0);
    end_pair();
    ROW(VmbPacketGetChannel, "after-cleanup", k.VmbPacketGetChannel(packet) == NULL && k.VmbPacketGetChannel(own) == NULL);
    free(own);
    return end();
}
