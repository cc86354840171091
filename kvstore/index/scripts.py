"""Keeps the prefix index inside Redis: its keys, and the Lua scripts, the only code to touch them.

    {tandem}:index          hash        v: version of the table of holders; n: number of blocks
    {tandem}:index:slots    hash        slot -> "token incarnation holder-id" of every holder that is not known dead
    {tandem}:index:ids      hash        holder id -> slot
    {tandem}:index:seqs     hash        slot -> number of the last batch applied
    {tandem}:index:dead     set         slots whose entries are being swept out
    {tandem}:index:sweeper  string      who sweeps at the moment, for a second
    {tandem}:index:held:S   string      what slot S has: one bit per bucket, 8 KiB
    {tandem}:ix:BB          hash        bucket BB (the first 2 bytes of a key) -> the other 6 bytes -> entries, or "*"
    {tandem}:ix:BBKKKKKK    string      the entries of a block that "*" stands for: more than 32 holders

Why so. A hash of a few hundred small fields is one packed run of bytes in Redis (ziplist, listpack), an order of
magnitude smaller than keys of their own; 2**16 buckets keep it so up to 30 million blocks. It turns into a real hash
table, for good, once one value exceeds 64 bytes: hence "*". A holder is a 12-bit slot number, so a block and a holder
cost 2 bytes. A slot is never used by two: whoever is restarted, or announces everything anew, gets another, which makes
the old entries invisible at once; they are swept by the bits in "held", never by SCAN, and then the slot is free again.

Whether a holder lives, and which of two processes is the one of that id, the registry says (`registry.py`): a slot is
claimed by whoever is registered, and swept once its holder is registered no more. There is no second lease.

All keys share one hash tag, for a script in a Redis Cluster must find its keys on one node. The scripts build bucket
names themselves: declaring a thousand keys per lookup would cost more than the lookup.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from kvstore.errors import RegistryError
from kvstore.index.entries import NUM_SLOTS

NUM_BUCKETS = 2**16


@dataclass(frozen=True)
class IndexKeys:
    """The names that the scripts are given; they derive the others."""

    index: str
    base: str

    @classmethod
    def under(cls, prefix: str) -> IndexKeys:
        """Return the names under a prefix; deployments that share a Redis take different ones."""
        if not prefix or "{" in prefix or "}" in prefix:
            raise RegistryError(f"an index prefix must be non-empty and without braces, not {prefix!r}")
        return cls(index=f"{{{prefix}}}:index", base=f"{{{prefix}}}:ix:")


class Script:
    """A Lua script and the digest under which Redis caches it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


_CLOCK = """
local index, base = KEYS[1], ARGV[1]
local clock = redis.call('TIME')
local now_ms = clock[1] * 1000 + math.floor(clock[2] / 1000)
"""

# registered(id): the incarnation that the registry has under this id; '' if none, or if its lease has ended.
_REGISTRY = """
local registry = string.sub(index, 1, -7) -- the index's name without ':index'
local function registered(id)
  local lease = redis.pcall('ZSCORE', registry .. ':leases', id)
  local record = redis.pcall('HGET', registry .. ':workers', id)
  if type(lease) ~= 'string' or tonumber(lease) <= now_ms or type(record) ~= 'string' then return '' end
  local ok, decoded = pcall(cjson.decode, record)
  if not ok or type(decoded) ~= 'table' or type(decoded.incarnation) ~= 'string' then return '' end
  return decoded.incarnation
end
"""

# First, what is not of its type, hence not ours, goes: a script that stops at it would leave its work half done. Where
# slots and ids do not match any more, nobody would find the slot of a holder that dies: all go, and are claimed anew.
# retire(slot): its entries become invisible and await the sweep. Lost bits are replaced by all bits.
_RETIRE = f"""
local types = {{[''] = 'hash', [':slots'] = 'hash', [':ids'] = 'hash', [':seqs'] = 'hash', [':dead'] = 'set',
  [':sweeper'] = 'string'}}
for suffix, expected in pairs(types) do
  local found = redis.call('TYPE', index .. suffix).ok
  if found ~= expected and found ~= 'none' then redis.call('DEL', index .. suffix) end
end
local function new_version(slot)
  redis.call('HSET', index, 'v', clock[1] .. '.' .. clock[2] .. '.' .. slot)
end
if redis.call('HLEN', index .. ':slots') ~= redis.call('HLEN', index .. ':ids') then
  for _, slot in ipairs(redis.call('HKEYS', index .. ':slots')) do
    if redis.call('EXISTS', index .. ':held:' .. slot) == 1 then redis.call('SADD', index .. ':dead', slot) end
  end
  redis.call('DEL', index .. ':slots', index .. ':ids', index .. ':seqs')
  new_version('')
end
local function retire(slot)
  local record = redis.call('HGET', index .. ':slots', slot)
  local id = record and string.match(record, '^%S+ %S+ (.+)$')
  if id and redis.call('HGET', index .. ':ids', id) == tostring(slot) then redis.call('HDEL', index .. ':ids', id) end
  redis.call('HDEL', index .. ':slots', slot)
  redis.call('HDEL', index .. ':seqs', slot)
  local held = index .. ':held:' .. slot
  if redis.call('TYPE', held).ok ~= 'string' or redis.call('STRLEN', held) ~= {NUM_BUCKETS // 8} then
    redis.call('SET', held, string.rep('\\255', {NUM_BUCKETS // 8}))
  end
  redis.call('SADD', index .. ':dead', slot)
  new_version(slot)
end
"""

# read_block: entries ('' for none, or for what is not ours) and whether they stand in a key of their own.
# write_block: returns by how much the number of blocks changed.
_BLOCKS = """
local function read_block(bucket, field, whole)
  local value = redis.pcall('HGET', bucket, field)
  if type(value) == 'table' then
    redis.call('DEL', bucket)
    return '', false
  end
  local is_wide = value == '*'
  if is_wide then value = redis.pcall('GET', whole) end
  if type(value) ~= 'string' or #value % 2 == 1 then value = '' end
  return value, is_wide
end
local function write_block(bucket, field, whole, value, was_wide)
  if value == '' then
    if was_wide then redis.call('DEL', whole) end
    return -redis.call('HDEL', bucket, field)
  end
  if #value > (was_wide and 32 or 64) then
    redis.call('SET', whole, value)
    return was_wide and 0 or redis.call('HSET', bucket, field, '*')
  end
  if was_wide then redis.call('DEL', whole) end
  return redis.call('HSET', bucket, field, value)
end
"""

# ARGV: base, holder id, incarnation, token (of the process), generation.
# Returns {slot}; {0, incarnation} while the registry has another process under the id, {0, ''} while it has none;
# {-1} when no slot is free.
CLAIM = Script(
    _CLOCK
    + _REGISTRY
    + _RETIRE
    + f"""
local id, incarnation, token = ARGV[2], ARGV[3], ARGV[4]
local rightful = registered(id)
if rightful ~= incarnation then return {{0, rightful}} end
local old = redis.call('HGET', index .. ':ids', id)
if old then retire(old) end
for slot = 1, {NUM_SLOTS} do
  local held = index .. ':held:' .. slot
  if redis.call('HEXISTS', index .. ':slots', slot) == 1 then
    -- taken
  elseif redis.call('EXISTS', held) == 1 then
    redis.call('SADD', index .. ':dead', slot) -- mostly there already; not if Redis lost something
  else
    redis.call('SETRANGE', held, {NUM_BUCKETS // 8 - 1}, '\\0')
    redis.call('HSET', index .. ':slots', slot, token .. '.' .. ARGV[5] .. ' ' .. incarnation .. ' ' .. id)
    redis.call('HSET', index .. ':ids', id, slot)
    redis.call('HSET', index .. ':seqs', slot, 0)
    new_version(slot)
    return {{slot}}
  end
end
return {{-1}}
"""
)

# ARGV: base, slot, record, batch number, changes ('': only ask). Applies the batch once, however often it arrives, and
# only if none before it is missing. Returns 1, or 0 if what we wrote is not what is here: announce everything anew.
WRITE = Script(
    _CLOCK
    + _BLOCKS
    + """
local slot, seq, changes = tonumber(ARGV[2]), tonumber(ARGV[4]), ARGV[5]
if redis.call('HGET', index .. ':slots', slot) ~= ARGV[3] then return 0 end
local last = tonumber(redis.call('HGET', index .. ':seqs', slot) or -1)
if last ~= seq and (changes == '' or last ~= seq - 1) then return 0 end
if last == seq then return 1 end

-- Returns the value with the tiers of our slot changed.
local function amend(value, clear, set)
  for i = 1, #value, 2 do
    local high, low = string.byte(value, i, i + 1)
    local entry = high * 256 + low
    local found = bit.rshift(entry, 4)
    if found >= slot then
      local tiers, rest = set, i
      if found == slot then tiers, rest = bit.bor(bit.band(entry, 15, bit.bnot(clear)), set), i + 2 end
      local ours = tiers == 0 and '' or string.char(bit.rshift(slot, 4), bit.band(slot, 15) * 16 + tiers)
      return string.sub(value, 1, i - 1) .. ours .. string.sub(value, rest), found == slot
    end
  end
  if set == 0 then return value, false end
  return value .. string.char(bit.rshift(slot, 4), bit.band(slot, 15) * 16 + set), false
end

local held = index .. ':held:' .. slot
local num_new = 0
for i = 1, #changes, 9 do
  local first, second, masks = string.byte(changes, i), string.byte(changes, i + 1), string.byte(changes, i + 8)
  local bucket, field = base .. string.sub(changes, i, i + 1), string.sub(changes, i + 2, i + 7)
  local whole = base .. string.sub(changes, i, i + 7)
  local value, is_wide = read_block(bucket, field, whole)
  local amended, was_ours = amend(value, bit.rshift(masks, 4), bit.band(masks, 15))
  if amended ~= value then
    num_new = num_new + write_block(bucket, field, whole, amended, is_wide)
    if not was_ours then redis.call('SETBIT', held, first * 256 + second, 1) end
  end
end
redis.call('HSET', index .. ':seqs', slot, seq)
if num_new ~= 0 then redis.call('HINCRBY', index, 'n', num_new) end
return 1
"""
)

# ARGV: base, slot, record. Retires the slot if it is still ours.
WITHDRAW = Script(
    _CLOCK
    + _RETIRE
    + """
if redis.call('HGET', index .. ':slots', ARGV[2]) ~= ARGV[3] then return 0 end
retire(ARGV[2])
return 1
"""
)

# ARGV: base, keys, version of the table of holders that the reader has. Returns {version, table or false, number of
# blocks of run 1, their value, ...}: a run is consecutive blocks of the same value, and the last one ends before the
# first block that nobody has. Writes nothing; garbage counts as nobody.
LOOKUP = Script(
    _CLOCK
    + """
local keys = ARGV[2]
local pcall, sub = redis.pcall, string.sub
local version = pcall('HGET', index, 'v')
if type(version) ~= 'string' then version = '' end
local holders = false
if version ~= ARGV[3] then
  holders = pcall('HGETALL', index .. ':slots')
  if holders.err then holders = {} end
end

local reply = {version, holders}
local size, run, current = 2, 0, nil
for i = 1, #keys, 8 do
  local value = pcall('HGET', base .. sub(keys, i, i + 1), sub(keys, i + 2, i + 7))
  if value == '*' then value = pcall('GET', base .. sub(keys, i, i + 7)) end
  if type(value) ~= 'string' or #value % 2 == 1 then break end
  if value == current then
    run = run + 1
  else
    if current then
      reply[size + 1], reply[size + 2] = run, current
      size = size + 2
    end
    run, current = 1, value
  end
end
if current then reply[size + 1], reply[size + 2] = run, current end
return reply
"""
)

# ARGV: base, sweeper's name, for how many ms nobody else may sweep, most buckets, most blocks.
# Retires holders that have left the registry, those whose lease there has ended included, then takes entries of the
# dead out of some buckets. Returns how many steps are left at least: 0 when no dead slot has entries any more; -1 if
# another process is at it. A bit is cleared with the entries that it stands for, so that the next call goes on where
# this one stopped.
SWEEP = Script(
    _CLOCK
    + _REGISTRY
    + _RETIRE
    + _BLOCKS
    + """
local type_of_departed = redis.call('TYPE', registry .. ':departed').ok
if type_of_departed ~= 'set' and type_of_departed ~= 'none' then redis.call('DEL', registry .. ':departed') end
local expired = redis.pcall('ZRANGEBYSCORE', registry .. ':leases', '-inf', now_ms, 'LIMIT', 0, 16)
for _, id in ipairs(expired) do
  redis.call('ZREM', registry .. ':leases', id)
  redis.call('HDEL', registry .. ':workers', id)
  redis.call('SADD', registry .. ':departed', id)
end
-- A registry whose last worker died goes as a whole, and tells nobody.
local is_empty = redis.call('EXISTS', registry .. ':leases') == 0
local departed = is_empty and redis.call('HKEYS', index .. ':ids')
  or redis.pcall('SRANDMEMBER', registry .. ':departed', 16)
for i = 1, math.min(16, #departed) do
  local id = departed[i]
  redis.call('SREM', registry .. ':departed', id)
  local slot = redis.call('HGET', index .. ':ids', id)
  local record = slot and redis.call('HGET', index .. ':slots', slot)
  if record and string.match(record, '^%S+ (%S+) ') ~= registered(id) then retire(slot) end
end
local more = (#expired == 16 or #departed >= 16) and 1 or 0
local dead = redis.call('SMEMBERS', index .. ':dead')
if #dead == 0 then return 0 end
local sweeper = redis.call('GET', index .. ':sweeper')
if sweeper and sweeper ~= ARGV[2] then return -1 end
redis.call('SET', index .. ':sweeper', ARGV[2], 'PX', ARGV[3])

local is_dead = {}
for _, slot in ipairs(dead) do is_dead[tonumber(slot)] = true end
local buckets_left, blocks_left = tonumber(ARGV[4]), tonumber(ARGV[5])
local num_gone = 0

-- Returns the value without the entries of the dead; marks whose entries there were.
local function strip(value, seen)
  local kept = {}
  for i = 1, #value, 2 do
    local high, low = string.byte(value, i, i + 1)
    local slot = bit.rshift(high * 256 + low, 4)
    if is_dead[slot] then seen[slot] = true else kept[#kept + 1] = string.sub(value, i, i + 1) end
  end
  return table.concat(kept)
end

local function sweep_bucket(number)
  local name = string.char(math.floor(number / 256), number % 256)
  local bucket, seen = base .. name, {}
  local fields = redis.pcall('HKEYS', bucket)
  if fields.err then
    redis.call('DEL', bucket)
    return seen
  end
  for _, field in ipairs(fields) do
    local value, is_wide = read_block(bucket, field, bucket .. field)
    local kept = strip(value, seen)
    if kept ~= value or value == '' then
      num_gone = num_gone - write_block(bucket, field, bucket .. field, kept, is_wide)
    end
  end
  blocks_left = blocks_left - #fields
  return seen
end

local num_dead = #dead
for _, slot in ipairs(dead) do
  local held = index .. ':held:' .. slot
  while buckets_left > 0 and blocks_left > 0 do
    local number = redis.call('BITPOS', held, 1)
    if number < 0 then
      redis.call('DEL', held)
      redis.call('SREM', index .. ':dead', slot)
      is_dead[tonumber(slot)] = nil
      num_dead = num_dead - 1
      break
    end
    local seen = sweep_bucket(number)
    seen[tonumber(slot)] = true
    for other in pairs(seen) do redis.call('SETBIT', index .. ':held:' .. other, number, 0) end
    buckets_left = buckets_left - 1
  end
end
if num_gone ~= 0 then redis.call('HINCRBY', index, 'n', -num_gone) end
return num_dead + more
"""
)
