/* Two threads in everything at once: whatever the order, nothing is lost and nothing happens twice. */
#include <pthread.h>
#include <stdatomic.h>

#include "check.h"

static int rounds;

static atomic_uintptr_t held;
static atomic_int ended;
static sem_t received, finished;

static VOID process(VMBCHANNEL channel, VMBPACKETCOMPLETION packet, PVOID buffer, UINT32 length, UINT32 flags)
{
    (void)channel;
    (void)buffer;
    (void)length;
    (void)flags;
    atomic_store(&held, (uintptr_t)packet);
    sem_post(&received);
    sem_post(&received);
}

static VOID count_end(VMBPACKET packet, NTSTATUS status, PVOID buffer, UINT32 length)
{
    (void)status;
    (void)buffer;
    (void)length;
    atomic_fetch_add(&ended, 1);
    k.VmbPacketFree(packet);
    sem_post(&finished);
}

/* Both threads complete the same packet. */
static void *complete(void *unused)
{
    int i;
    for (i = 0; i < rounds; i++) {
        await(&received);
        k.VmbChannelPacketComplete((VMBPACKETCOMPLETION)(void *)atomic_load(&held), NULL, 0);
        await(&finished);
        sem_post((sem_t *)unused);
    }
    return NULL;
}

static void *churn(void *stop)
{
    while (!atomic_load((atomic_int *)stop)) {
        VMBPACKET packet = k.VmbPacketAllocate(client.channel);
        if (packet != NULL) {
            k.VmbPacketSetPointer(packet, stop);
            (void)k.VmbPacketSend(packet, "churning", 8, NULL, 0);
        }
        k.VmbChannelSetTransactionQuota(server.channel, 1 + (UINT32)rand() % 7);
        k.VmbChannelSetIncomingProcessingAtPassive(server.channel, (BOOLEAN)(rand() & 1));
        (void)KmclChannelGetState(server.channel);
        sched_yield();
    }
    return NULL;
}

static VOID echo(VMBCHANNEL channel, VMBPACKETCOMPLETION packet, PVOID buffer, UINT32 length, UINT32 flags)
{
    (void)channel;
    (void)flags;
    k.VmbChannelPacketComplete(packet, buffer, length);
}

int main(void)
{
    pthread_t one, other;
    sem_t turn;
    atomic_int stop = 0;
    int i, slow = getenv("KMCL_SLOW") != NULL; /* where every access is looked at */

    begin();
    rounds = slow ? 20 : 400;
    NEED(sem_init(&received, 0, 0) == 0 && sem_init(&finished, 0, 0) == 0 && sem_init(&turn, 0, 0) == 0);
    make_pair(process);
    run_pair();
    NEED(pthread_create(&one, NULL, complete, &turn) == 0 && pthread_create(&other, NULL, complete, &turn) == 0);
    for (i = 0; i < rounds; i++) {
        VMBPACKET packet = k.VmbPacketAllocate(client.channel);
        NEED(packet != NULL);
        k.VmbPacketSetCompletionRoutine(packet, count_end);
        NEED(k.VmbPacketSend(packet, "message", 8, NULL, WAIT) == STATUS_SUCCESS);
        /* One end for the two completions: the other thread is let go by hand. */
        while (atomic_load(&ended) <= i) {
            sched_yield();
        }
        sem_post(&finished);
        await(&turn);
        await(&turn);
    }
    NEED(pthread_join(one, NULL) == 0 && pthread_join(other, NULL) == 0);
    ROW(VmbChannelPacketComplete, "two-threads-one-end", (await_outstanding(0), atomic_load(&ended) == rounds));
    end_pair();

    /* Life-cycle calls against traffic. */
    make_pair(echo);
    run_pair();
    NEED(pthread_create(&one, NULL, churn, &stop) == 0 && pthread_create(&other, NULL, churn, &stop) == 0);
    for (i = 0; i < rounds / 8; i++) {
        k.VmbChannelPause(server.channel);
        k.VmbChannelStart(server.channel);
        k.VmbChannelDisable(client.channel);
        NEED(k.VmbChannelEnable(client.channel) == STATUS_SUCCESS);
        await(&client.active);
    }
    atomic_store(&stop, 1);
    NEED(pthread_join(one, NULL) == 0 && pthread_join(other, NULL) == 0);
    ROW(VmbChannelDisable, "against-traffic", (await_state(&client, KmclChannelActive), 1));
    k.VmbChannelDisable(client.channel);
    k.VmbChannelDisable(server.channel);
    NEED(pthread_create(&one, NULL, churn, &stop) == 0 && pthread_join(one, NULL) == 0);
    end_pair();
    ROW(VmbChannelCleanup, "against-stale-handles", KmclChannelGetState(server.channel) == KmclChannelInvalid);
    return end();
}
