"""Rewards over HTTP: images in multipart, everything else JSON, nothing pickled.

The server is `app` (the application) and `serving` (the process that listens); a client needs
`endpoints` and `wire` alone. So nothing is imported here: a run that uses the reward `http` loads
no web framework.

The server bounds a request before accepting it: the body is counted as it is read, an image's size
is read from its header before it is decoded, and the number of requests held at once is limited.
What exceeds a bound is rejected with a status of its own, and the service keeps running.
"""
