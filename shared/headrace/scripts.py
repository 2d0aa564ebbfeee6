"""The Lua scripts: every step that must happen as a whole or not at all.

Invariant: an entry of a job stream exists exactly once somewhere (intake or one worker) from the
moment its request is accepted until its finish stands in the reply stream. A script that moves or
ends a job first checks that the mover still has the right to: the dispatcher its leadership, the
worker its attempt.
"""

from __future__ import annotations

from headrace.keys import EVENTS_MAX

ACCEPT = """
-- KEYS job, intake; ARGV payload, ttl_ms, attempt. Idempotent: a repeated call changes nothing.
local seen = redis.call('HGET', KEYS[1], 'intake')
if seen then return seen end
local id = redis.call('XADD', KEYS[2], '*', 'job', ARGV[1])
redis.call('HSET', KEYS[1], 'attempt', ARGV[3], 'intake', id)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return id
"""

CANCEL = """
-- KEYS job, intake; ARGV job_id. The nudge goes to wherever the job is now, behind the job itself.
if redis.call('EXISTS', KEYS[1]) == 0 or redis.call('HGET', KEYS[1], 'done') then return 0 end
redis.call('HSET', KEYS[1], 'cancelled', 1)
local stream = redis.call('HGET', KEYS[1], 'stream')
redis.call('XADD', stream or KEYS[2], '*', 'cancel', ARGV[1])
return 1
"""

HANDOFF = """
-- KEYS leader, job, source stream, target stream, target load, target lease
-- ARGV leader token, source entry, payload, attempt, cost, tokens_max, jobs_max
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 'deposed' end
local facts = redis.call('HMGET', KEYS[2], 'attempt', 'cancelled')
if facts[2] then return 'cancelled' end
if facts[1] ~= ARGV[4] then return 'stale' end
if redis.call('EXISTS', KEYS[6]) == 0 then return 'gone' end
local held = redis.call('HMGET', KEYS[5], 'tokens', 'jobs')
local tokens, jobs = tonumber(held[1] or 0), tonumber(held[2] or 0)
if jobs > 0 and (tokens + ARGV[5] > tonumber(ARGV[6]) or jobs + 1 > tonumber(ARGV[7])) then
  return 'full'
end
if redis.call('XDEL', KEYS[3], ARGV[2]) == 0 then return 'taken' end
redis.call('HINCRBY', KEYS[5], 'tokens', ARGV[5])
redis.call('HINCRBY', KEYS[5], 'jobs', 1)
redis.call('XADD', KEYS[4], '*', 'job', ARGV[3])
redis.call('HSET', KEYS[2], 'stream', KEYS[4])
return 'ok'
"""

PLACE = """
-- KEYS leader, job, intake, target stream, target load, target lease
-- ARGV leader token, ttl_ms, payload, attempt, cost, tokens_max, jobs_max
-- ACCEPT and HANDOFF of a new job in one step, where nobody that was accepted before it waits; else
-- ACCEPT alone. Answers the id of its entry, and 'ok' or why it stands in the intake stream.
-- Idempotent as ACCEPT is: of a job that was accepted before it changes nothing.
local seen = redis.call('HGET', KEYS[2], 'intake')
if seen then return {seen, 'seen'} end
local why, tokens, jobs = 'ok'
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  why = 'deposed'
elseif redis.call('XLEN', KEYS[3]) > 0 then
  why = 'behind'
elseif redis.call('EXISTS', KEYS[6]) == 0 then
  why = 'gone'
else
  local held = redis.call('HMGET', KEYS[5], 'tokens', 'jobs')
  tokens, jobs = (held[1] or 0) + ARGV[5], (held[2] or 0) + 1
  if jobs > 1 and (tokens > tonumber(ARGV[6]) or jobs > tonumber(ARGV[7])) then why = 'full' end
end
local id
if why == 'ok' then
  id = redis.call('XADD', KEYS[4], '*', 'job', ARGV[3])
  redis.call('HSET', KEYS[2], 'attempt', ARGV[4], 'intake', id, 'stream', KEYS[4])
  redis.call('HSET', KEYS[5], 'tokens', tokens, 'jobs', jobs)
else
  id = redis.call('XADD', KEYS[3], '*', 'job', ARGV[3])
  redis.call('HSET', KEYS[2], 'attempt', ARGV[4], 'intake', id)
end
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return {id, why}
"""

FENCE = """
-- KEYS leader, job, replies, source stream
-- ARGV leader token, attempt seen, fence payload, replies ttl, source entry
-- Ends an attempt: what it still writes stands behind the fence and does not count.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 'deposed' end
local facts = redis.call('HMGET', KEYS[2], 'attempt', 'done')
if facts[2] or facts[1] ~= ARGV[2] then return 'stale' end
if #redis.call('XRANGE', KEYS[4], ARGV[5], ARGV[5]) == 0 then return 'stale' end
redis.call('HINCRBY', KEYS[2], 'attempt', 1)
redis.call('HDEL', KEYS[2], 'stream')
local id = redis.call('XADD', KEYS[3], '*', 'd', ARGV[3])
redis.call('PEXPIRE', KEYS[3], ARGV[4], 'NX')
return id
"""

FINISH = f"""
-- KEYS job, source stream, load, replies, events, lease
-- ARGV attempt, source entry, payload, cost, linger_ms, replies_ttl_ms, event
-- The last tokens, the end, the release of the room and the entry's removal, in one step.
-- A fenced attempt touches nothing: the entry may be all that is left of the job. Nor does an
-- entry count that stands here no more: the job is somebody else's.
local attempt = redis.call('HGET', KEYS[1], 'attempt')
if attempt and attempt ~= ARGV[1] then return 0 end
if redis.call('XDEL', KEYS[2], ARGV[2]) == 0 then return 0 end
if tonumber(ARGV[4]) > 0 and redis.call('EXISTS', KEYS[6]) == 1 then
  redis.call('HINCRBY', KEYS[3], 'tokens', -ARGV[4])
  redis.call('HINCRBY', KEYS[3], 'jobs', -1)
end
redis.call('XADD', KEYS[5], 'MAXLEN', '~', {EVENTS_MAX}, '*', 'e', ARGV[7])
if not attempt or redis.call('HGET', KEYS[1], 'done') then return 0 end
redis.call('XADD', KEYS[4], '*', 'd', ARGV[3])
redis.call('PEXPIRE', KEYS[4], ARGV[6], 'NX')
redis.call('HSET', KEYS[1], 'done', 1)
redis.call('PEXPIRE', KEYS[1], ARGV[5])
return 1
"""

MOVE = f"""
-- KEYS job, source stream, source load, source lease, target stream, target load, target lease,
-- replies, events
-- ARGV attempt, source entry, payload, fence, cost, tokens_max, jobs_max, replies_ttl_ms, event
-- A running job goes on elsewhere: room is taken there, given back here, and the fence ends the
-- attempt that wrote what the payload starts from. Called again after an unknown outcome it says
-- what came of it.
local facts = redis.call('HMGET', KEYS[1], 'attempt', 'done', 'cancelled', 'stream')
local next = tostring(tonumber(ARGV[1]) + 1)
if facts[1] == next and facts[4] == KEYS[5] then return 'ok' end
if facts[1] ~= ARGV[1] or facts[2] then return 'stale' end
if #redis.call('XRANGE', KEYS[2], ARGV[2], ARGV[2]) == 0 then return 'stale' end
if facts[3] then return 'cancelled' end
if redis.call('EXISTS', KEYS[7]) == 0 then return 'gone' end
local held = redis.call('HMGET', KEYS[6], 'tokens', 'jobs')
local tokens, jobs = tonumber(held[1] or 0), tonumber(held[2] or 0)
if jobs > 0 and (tokens + ARGV[5] > tonumber(ARGV[6]) or jobs + 1 > tonumber(ARGV[7])) then
  return 'full'
end
redis.call('XDEL', KEYS[2], ARGV[2])
if redis.call('EXISTS', KEYS[4]) == 1 then
  redis.call('HINCRBY', KEYS[3], 'tokens', -ARGV[5])
  redis.call('HINCRBY', KEYS[3], 'jobs', -1)
end
redis.call('HINCRBY', KEYS[6], 'tokens', ARGV[5])
redis.call('HINCRBY', KEYS[6], 'jobs', 1)
redis.call('XADD', KEYS[8], '*', 'd', ARGV[4])
redis.call('PEXPIRE', KEYS[8], ARGV[8], 'NX')
redis.call('XADD', KEYS[5], '*', 'job', ARGV[3])
redis.call('HSET', KEYS[1], 'attempt', next, 'stream', KEYS[5])
redis.call('XADD', KEYS[9], 'MAXLEN', '~', {EVENTS_MAX}, '*', 'e', ARGV[9])
return 'ok'
"""

RENEW = """
-- KEYS leader; ARGV token, ttl_ms. A lease that ran out is not renewed, even when it is free:
-- somebody may have led in between.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

RELEASE = """
-- KEYS leader, board; ARGV token: give the lease back if it is ours, with what it let us publish.
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1], KEYS[2]) end
return 0
"""

BURY = """
-- KEYS leader, worker registry, jobs, load, lease, status, blocks; ARGV leader token, worker
-- Forgets a dead worker once nothing of its stream is left to hand on.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 'deposed' end
if redis.call('EXISTS', KEYS[5]) == 1 then return 'alive' end
if redis.call('XLEN', KEYS[3]) > 0 then return 'busy' end
redis.call('HDEL', KEYS[2], ARGV[2])
redis.call('DEL', KEYS[3], KEYS[4], KEYS[6], KEYS[7])
return 'ok'
"""

_FLIGHT_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

FLIGHT_JOIN = f"""
-- KEYS flight; ARGV job, rank, payload, lease_ms, job that is not followed any more
-- The job that computes what all who ask the same wait for: the one that stands here, unless it
-- comes later than the asker or is given up, else the asker's own from now on. Answers its id,
-- since when, and its payload. A reader's lease is a field of its own.
{_FLIGHT_NOW}
local held = redis.call('HMGET', KEYS[1], 'job', 'rank', 'since', 'payload')
local ends = string.format('%.0f', now + ARGV[4])
if held[1] and held[1] ~= ARGV[5] and tonumber(held[2]) <= tonumber(ARGV[2]) then
  redis.call('HSET', KEYS[1], 'r:' .. ARGV[1], ends)
  return {{held[1], tonumber(held[3]), held[4]}}
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'job', ARGV[1], 'rank', ARGV[2], 'since', string.format('%.0f', now),
  'payload', ARGV[3], 'r:' .. ARGV[1], ends)
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return {{ARGV[1], now, ARGV[3]}}
"""

FLIGHT_STAY = f"""
-- KEYS flight; ARGV job, reader, lease_ms. The reader goes on reading; 0: nobody new follows `job`.
if redis.call('HGET', KEYS[1], 'job') ~= ARGV[1] then return 0 end
{_FLIGHT_NOW}
redis.call('HSET', KEYS[1], 'r:' .. ARGV[2], string.format('%.0f', now + ARGV[3]))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""

FLIGHT_LEAVE = f"""
-- KEYS flight; ARGV job, reader. How many others read on; -1 where that is not known.
if redis.call('HGET', KEYS[1], 'job') ~= ARGV[1] then return -1 end
{_FLIGHT_NOW}
redis.call('HDEL', KEYS[1], 'r:' .. ARGV[2])
local held, others = redis.call('HGETALL', KEYS[1]), 0
for i = 1, #held, 2 do
  if held[i]:sub(1, 2) == 'r:' and tonumber(held[i + 1]) > now then others = others + 1 end
end
if others == 0 then redis.call('DEL', KEYS[1]) end
return others
"""

FLIGHT_END = """
-- KEYS flight; ARGV job. Nobody new follows `job`.
if redis.call('HGET', KEYS[1], 'job') == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""

_LIMIT_USE = """
-- What a key has used of its minute, requests and tokens, drained evenly since it was stored.
-- Redis' own time, so that the gateways' clocks do not matter.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local held = redis.call('HMGET', KEYS[1], 'requests', 'tokens', 'at')
local elapsed = math.max(0, now - (held[3] or now))
local limits = {tonumber(ARGV[2]), tonumber(ARGV[3])}
local used = {}
for i = 1, 2 do
  used[i] = math.max(0, tonumber(held[i] or 0) - elapsed * limits[i] / 60000000)
  if limits[i] == 0 then used[i] = 0 end
end
local function exact(number) return string.format('%.17g', number) end
local function keep()
  local full = 0
  for i = 1, 2 do
    if limits[i] > 0 then full = math.max(full, used[i] / limits[i]) end
  end
  if full == 0 then return redis.call('DEL', KEYS[1]) end
  redis.call('HSET', KEYS[1], 'requests', exact(used[1]), 'tokens', exact(used[2]),
    'at', string.format('%.0f', now))
  redis.call('PEXPIRE', KEYS[1], math.ceil(full * 60000) + 1000)
end
"""

LIMIT_TAKE = f"""
-- KEYS used, running; ARGV lease, limits a minute of requests and tokens, of running requests
-- (0: none), tokens to take, lease_ms
-- One request, its tokens and its place among the running, all or nothing. Answers what stood in
-- the way ('' when it was taken), how long it does in us, and what is used now.
{_LIMIT_USE}
local asked = {{1, tonumber(ARGV[5])}}
local reason, wait = '', 0
for i, name in ipairs({{'requests', 'tokens'}}) do
  local over = used[i] + asked[i] - limits[i]
  -- what is left of dividing and drained in parts is no use
  if limits[i] > 0 and over > 0.000001 and over * 60000000 / limits[i] > wait then
    reason, wait = name, over * 60000000 / limits[i]
  end
end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', now))
local running = redis.call('ZCARD', KEYS[2])
local most = tonumber(ARGV[4])
if reason == '' and most > 0 and running >= most then reason = 'concurrency' end
if reason == '' then
  for i = 1, 2 do
    if limits[i] > 0 then used[i] = used[i] + asked[i] end
  end
  keep()
  if most > 0 then
    redis.call('ZADD', KEYS[2], string.format('%.0f', now + ARGV[6] * 1000), ARGV[1])
    redis.call('PEXPIRE', KEYS[2], ARGV[6])
  end
end
return {{reason, exact(wait), exact(used[1]), exact(used[2])}}
"""

LIMIT_SETTLE = f"""
-- KEYS used, running; ARGV lease, limits a minute of requests and tokens, what to add to the use
-- of each (below 0: to give back). Ends the lease. Answers what is used now.
{_LIMIT_USE}
for i = 1, 2 do
  if limits[i] > 0 then used[i] = math.max(0, used[i] + tonumber(ARGV[3 + i])) end
end
keep()
redis.call('ZREM', KEYS[2], ARGV[1])
return {{exact(used[1]), exact(used[2])}}
"""

LIMIT_RENEW = """
-- KEYS running; ARGV lease_ms, leases: what still runs, also where its lease ran out meanwhile.
local time = redis.call('TIME')
local ends = string.format('%.0f', time[1] * 1000000 + time[2] + ARGV[1] * 1000)
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], ends, ARGV[i]) end
return redis.call('PEXPIRE', KEYS[1], ARGV[1])
"""
