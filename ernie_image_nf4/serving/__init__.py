"""The server behind ``ernie-image-nf4 serve``: a page and OpenAI's images API over one queue and a worker for each GPU.

A request becomes a `DrawRequest`, whoever sent it (`requests`). The `Engine` (`engine`) puts its pictures in a queue
(`queue`) and hands batches of one shape to its workers, processes that hold the model (`worker`). What happens to a
request comes back as events (`events`): `endpoint` makes HTTP answers of them, `page` a web page, `application` puts
both together, and `cluster` runs that on many machines.

Only `worker` imports torch, and only in its own process. Imports from generation and from below.
"""
