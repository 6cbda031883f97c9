"""How messages reach the processors: one client for each processor, one hub for all changefeeds.

The life of a heartbeat. Four queues, each bounded for each sender and changefeed; a queue is needed wherever a thread hands over
to another one, and nowhere else:

     1. owner.scheduling.scheduler.Scheduler.tick          thread "tick": decides, sends to its Transport
     2. owner.exchange.hub.ExchangeHub._send               routes each message to the client of its receiver
     3. tablewire.runtime.message_queues.Outbox            queue: of each kind and changefeed the newest
     4. owner.exchange.processor_client.ProcessorClient    thread "exchange-<capture>": encodes a batch, calls, one at a time
     5. processor.service.exchange_server.ExchangeServer   gRPC's pool: decodes, refuses former owners
     6. tablewire.runtime.mailbox.Mailbox                  queue: batches for the agents' loop
     7. processor.service.agents.AgentHost                 thread "agents": hands each agent its messages, ticks it
     8. processor.agent.agent.Agent.tick                   applies them, calls the executor, sends a report
     9. tablewire.runtime.message_queues.Outbox            queue: of each changefeed the newest response
    10. processor.service.exchange_server.ExchangeServer   gRPC's pool: encodes the answer
    11. owner.exchange.processor_client.ProcessorClient    decodes it; hub.deliver routes it and wakes the tick if it matters
    12. tablewire.runtime.message_queues.ChangefeedTransport    queue: the inbox that the next Scheduler.tick reads

Guarantees: one call in flight for each processor; a slow processor delays only itself; a busy changefeed pushes out only its
own messages; what is dropped is restated by the next tick. The batch is written in the newest protocol version that both ends
support. An answer waits at most `exchange.wait_ms` for spans to settle.
"""
