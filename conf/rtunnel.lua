-- A Wireshark dissector for the frames of PROTOCOL.md, at both levels; Wireshark 4.0 or newer.
--
--   tshark -X lua_script:conf/rtunnel.lua -r FILE -V            what each frame says
--   tshark -X lua_script:conf/rtunnel.lua -X lua_script1:3 -r FILE -q     follow stream 3 (of each session)
--   tshark -X lua_script:conf/rtunnel.lua -o tls.keylog_file:FILE ...     over TLS: what SSLKEYLOGFILE wrote
--
-- Wireshark itself: copy it into the folder of personal plugins (Help, About, Folders). A session is found by its INIT
-- on any port, in TLS too; one whose INIT is not in the capture by "Decode As" on its port. Where another protocol owns
-- one of the two ports: -o tcp.try_heuristic_first:TRUE. Filters: rtunnel.id == 3,
-- rtunnel.type == "WINDOW", rtunnel.broken (a broken rule, by its number). Menu: Tools, rtunnel, Follow a stream.

local NEW_CONN, DATA, CLOSE_CONN, INIT, WELCOME, WINDOW = 1, 2, 3, 4, 5, 6
local EOF, PING, PONG, GOAWAY, BLOCKED = 7, 8, 9, 10, 11
local CLIENT, SERVER = 1, 2
local ENDS = { "client", "server" }
local HEADER_BYTES = 9
local MAX_CONTROL_BYTES, MAX_DATA_BYTES, MAX_SENT_BYTES = 4096, 1048576, 65536 - 9
local MAX_CREDIT, MAX_STRANGE_FRAMES = 2147483647, 16

-- The table of frames (PROTOCOL.md, section 2): name, level, who sends it, whether its id is a stream's, the
-- shortest and the longest payload at level 1.
local KINDS = {
    [NEW_CONN] = { name = "NEW_CONN", level = 0, only = SERVER, on_stream = true, least = 0, most = 64 },
    [DATA] = { name = "DATA", level = 0, on_stream = true, least = 0, most = MAX_DATA_BYTES },
    [CLOSE_CONN] = { name = "CLOSE_CONN", level = 0, on_stream = true, least = 0, most = 64 },
    [INIT] = { name = "INIT", level = 0, only = CLIENT, least = 0, most = MAX_CONTROL_BYTES },
    [WELCOME] = { name = "WELCOME", level = 0, only = SERVER, least = 0, most = MAX_CONTROL_BYTES },
    [WINDOW] = { name = "WINDOW", level = 1, on_stream = true, least = 4, most = 4 },
    [EOF] = { name = "EOF", level = 1, on_stream = true, least = 0, most = 0 },
    [PING] = { name = "PING", level = 1, least = 8, most = 8 },
    [PONG] = { name = "PONG", level = 1, least = 8, most = 8 },
    [GOAWAY] = { name = "GOAWAY", level = 1, least = 0, most = 64 },
    [BLOCKED] = { name = "BLOCKED", level = 1, on_stream = true, least = 0, most = 0 },
}

local CODES = {
    ["bad-request"] = true, ["port-denied"] = true, ["port-in-use"] = true, ["unavailable"] = true,
    ["too-many-clients"] = true, ["shutting-down"] = true,
}

local rtunnel = Proto("rtunnel", "rtunnel, a reverse TCP tunnel")
local fields = {
    type = ProtoField.string("rtunnel.type", "Type"),
    id = ProtoField.uint32("rtunnel.id", "Stream"),
    length = ProtoField.uint32("rtunnel.length", "Length"),
    sender = ProtoField.string("rtunnel.sender", "Sender"),
    level = ProtoField.uint8("rtunnel.level", "Level"),
    payload = ProtoField.bytes("rtunnel.payload", "Payload"),
    data = ProtoField.bytes("rtunnel.data", "Data"),
    visitor = ProtoField.string("rtunnel.visitor", "Visitor"),
    reason = ProtoField.string("rtunnel.reason", "Reason"),
    port = ProtoField.string("rtunnel.port", "Public port"),
    ["local"] = ProtoField.string("rtunnel.local", "Local service"),
    version = ProtoField.string("rtunnel.version", "Version"),
    window = ProtoField.string("rtunnel.window", "Window"),
    instance = ProtoField.string("rtunnel.instance", "Instance"),
    takeover = ProtoField.string("rtunnel.takeover", "Takeover"),
    error = ProtoField.string("rtunnel.error", "Error"),
    message = ProtoField.string("rtunnel.message", "Message"),
    line = ProtoField.string("rtunnel.line", "Line"),
    credit = ProtoField.uint32("rtunnel.credit", "More bytes"),
    echo = ProtoField.bytes("rtunnel.echo", "Bytes to echo"),
    broken = ProtoField.string("rtunnel.broken", "Broken rule"),
}
rtunnel.fields = fields
local broken_rule = ProtoExpert.new(
    "rtunnel.rule", "A rule of PROTOCOL.md is broken", expert.group.PROTOCOL, expert.severity.ERROR
)
rtunnel.experts = { broken_rule }

local tcp_stream = Field.new("tcp.stream")

-- ---- sessions: what is certain of each, as tests/helpers/judge.py has it --------------------------------------------

local sessions = {} -- by TCP stream
local notes = {} -- by packet: what was found of its frames when it was first seen, in order
local rests = {} -- by packet: the bytes of a frame that came before each of its records, in order

function rtunnel.init()
    sessions, notes, rests = {}, {}, {}
end

-- What `make` gives at the first sight of a packet; later the same again, however often it is shown. A packet's parts
-- come in the same order each time.
local function remember(memory, pinfo, make)
    local known = memory[pinfo.number]
    if known == nil then
        known = { seen = 0 }
        memory[pinfo.number] = known
    end
    if not pinfo.visited then
        table.insert(known, make())
        return known[#known]
    end
    known.seen = known.seen % #known + 1
    return known[known.seen]
end

local function session_of()
    local number = tcp_stream().value
    if sessions[number] == nil then
        sessions[number] = {
            strange = 0, inits = 0, last = 0, streams = {}, window = { 0, 0 }, goaway = {}, pings = { {}, {} },
        }
    end
    return sessions[number]
end

-- Who has sent this packet: the client is who has said INIT, else who does not own the lower port.
local function sender_of(session, pinfo, kind)
    if session.client == nil then
        if kind == INIT then
            session.client = pinfo.src_port
        elseif kind == WELCOME or kind == NEW_CONN then
            session.client = pinfo.dst_port
        end
    end
    if session.client == nil then
        return pinfo.src_port > pinfo.dst_port and CLIENT or SERVER
    end
    return pinfo.src_port == session.client and CLIENT or SERVER
end

local function lines_of(text)
    local found = {}
    for line in (text .. "\n"):gmatch("([^\n]*)\n") do
        local key, value = line:match("^([^=]*)=(.*)$")
        if key then
            found[key] = value
        end
    end
    return found
end

local function number_in(text, least, most)
    local value = text and text:match("^%d+$") and #text <= 10 and tonumber(text)
    return value and value >= least and value <= most and value or nil
end

local function is_reason(text)
    return #text <= 64 and not text:find("[^\32-\126]")
end

local function has_ended(stream)
    return stream.closed[CLIENT] or stream.closed[SERVER] or (stream.eof[CLIENT] and stream.eof[SERVER])
end

local judge = {}

judge[INIT] = function(session, frame)
    session.inits = session.inits + 1
    if session.inits > 1 then
        return "O-9", "a second INIT"
    end
    local first, rest = frame.text:match("^([^\n]*)\n?(.*)$")
    local lines = lines_of(rest)
    session.version = lines.version
    if lines.version == nil then
        session.level = session.level or 0
    end
    session.window[CLIENT] = number_in(lines.window, 1, MAX_CREDIT) or 0
    if not number_in(first:match("^(%d+):"), 0, 65535) then
        return lines.version and "N-5" or "O-2", "INIT's first line is no port and address"
    end
    if lines.version and (session.window[CLIENT] == 0 or not number_in(lines.version, 1, 2147483648)
        or not (lines.instance or ""):match("^[0-9a-f]+$") or #lines.instance ~= 32) then
        return "N-5", "INIT's version, window or instance"
    end
end

judge[WELCOME] = function(session, frame)
    if session.level == 0 and session.inits > 0 and session.version == nil then
        return "N-1", "WELCOME, and INIT has not announced level 1"
    elseif session.level ~= nil then
        return "N-2", "WELCOME behind another frame"
    end
    session.level = 1
    local lines = lines_of(frame.text)
    if lines.error then
        session.refused = true
        if not CODES[lines.error] or lines.message == nil then
            return "N-6", "a refusal with the code " .. lines.error
        end
        return
    end
    session.window[SERVER] = number_in(lines.window, 1, MAX_CREDIT) or 0
    if lines.version ~= "1" or not number_in(lines.port, 1, 65535) or session.window[SERVER] == 0 then
        return "N-7", "WELCOME's version, port or window"
    end
end

judge[PING] = function(session, frame)
    table.insert(session.pings[frame.sender], frame.text)
end

judge[PONG] = function(session, frame)
    if table.remove(session.pings[3 - frame.sender], 1) ~= frame.text then
        return "H-3", "PONG without its PING, or ahead of an older one's"
    end
end

judge[GOAWAY] = function(session, frame)
    local again = session.goaway[frame.sender]
    session.goaway[frame.sender] = true
    if again and frame.text ~= "stopping" then
        return "G-5", "a further GOAWAY"
    elseif not is_reason(frame.text) then
        return "E-3", "a reason that is not printable ASCII"
    end
end

judge[NEW_CONN] = function(session, frame)
    local known, last = session.streams[frame.id], session.last
    if session.level == 1 and frame.id <= last then
        return "S-2", "NEW_CONN for stream " .. frame.id .. " after stream " .. last
    elseif frame.id == 0 or (known and not has_ended(known)) then
        return "S-2", "NEW_CONN for a stream that is open"
    end
    session.last = math.max(last, frame.id)
    session.streams[frame.id] = {
        credit = { session.window[SERVER], session.window[CLIENT] }, eof = {}, closed = {}, blocked = { 0, 0 },
    }
    local visitor = frame.text:lower()
    local port = visitor:match("^[%d.]+:(%d+)$") or visitor:match("^%[[%x:.]+%]:(%d+)$")
    if session.level == 1 and (not number_in(port, 1, 65535) or visitor:match("^%[::ffff:[%d.]+%]")) then
        return "S-8", "NEW_CONN without a visitor's address"
    elseif session.level == 1 and session.goaway[SERVER] then
        return "G-1", "NEW_CONN after GOAWAY"
    elseif frame.id ~= last + 1 then
        return "S-1", "NEW_CONN for stream " .. frame.id .. " after stream " .. last
    end
end

local function judge_stream(session, frame)
    local stream, own, other = session.streams[frame.id], frame.sender, 3 - frame.sender
    if stream == nil then
        local is_error = session.level ~= 0 and (frame.id == 0 or frame.id > session.last)
        return is_error and "S-5" or "S-1", "no NEW_CONN has named stream " .. frame.id
    elseif stream.closed[own] then
        return session.level == 1 and "T-4" or "E-1", "a frame behind its own CLOSE_CONN"
    elseif stream.eof[own] and (frame.kind == DATA or frame.kind == EOF) then
        return "T-2", KINDS[frame.kind].name .. " behind EOF"
    elseif stream.eof[own] and frame.kind == BLOCKED then
        return "T-3", "BLOCKED behind EOF"
    end
    local ended = has_ended(stream)
    if frame.kind == DATA and session.level == 1 then
        stream.credit[own] = stream.credit[own] - frame.length
        if stream.credit[own] < 0 then
            return "W-2", -stream.credit[own] .. " bytes beyond the credit"
        end
    elseif frame.kind == WINDOW and not ended then
        stream.credit[other] = stream.credit[other] + frame.number
        stream.blocked[other] = stream.blocked[other] - 1
        if frame.number == 0 or stream.credit[other] > MAX_CREDIT then
            return "W-3", "WINDOW of " .. frame.number
        end
    elseif frame.kind == BLOCKED then
        stream.blocked[own] = stream.blocked[own] + 1
        if stream.blocked[own] > 1 then
            return "W-5", "BLOCKED again, and no WINDOW has come since"
        end
    elseif frame.kind == EOF then
        stream.eof[own] = true
    elseif frame.kind == CLOSE_CONN then
        stream.closed[own] = true
        if not is_reason(frame.text) then
            return "E-3", "a reason that is not printable ASCII"
        end
    end
end

-- The rule that a frame breaks, and how; nothing where it breaks none.
local function judge_frame(session, frame)
    local kind = KINDS[frame.kind]
    if frame.kind == DATA and (frame.length > MAX_SENT_BYTES or frame.length == 0) then
        session.dead = session.dead or frame.length > MAX_DATA_BYTES
        return "F-2", "a DATA frame of " .. frame.length .. " bytes of payload"
    elseif frame.kind ~= DATA and frame.length > MAX_CONTROL_BYTES then
        return "F-1", "a payload of " .. frame.length .. " bytes"
    elseif kind == nil then
        session.strange = session.strange + (session.inits == 0 and session.level == nil and 1 or 0)
        if session.strange > MAX_STRANGE_FRAMES then
            return "O-5", "over " .. MAX_STRANGE_FRAMES .. " frames of unknown types before INIT"
        end
        return
    elseif kind.only and kind.only ~= frame.sender then
        return "F-8", kind.name .. " is not the " .. ENDS[frame.sender] .. "'s to send"
    elseif session.refused and frame.sender == SERVER then
        return "N-6", "a frame behind the refusal"
    elseif session.level == nil and frame.sender == CLIENT and session.inits == 0 and frame.kind ~= INIT then
        local is_dropped = frame.kind == DATA or frame.kind == CLOSE_CONN
        return is_dropped and "O-1" or "O-5", kind.name .. " before INIT"
    end
    if session.level == nil and frame.sender == SERVER and frame.kind ~= WELCOME then
        session.level = 0
    end
    if kind.level > (session.level or 0) then
        return session.level and "F-9" or "N-2", kind.name .. " at level 0"
    elseif session.level == 1 and (frame.length < kind.least or frame.length > kind.most
        or (frame.id ~= 0) ~= (kind.on_stream or false)) then
        return "F-7", kind.name .. " with id " .. frame.id .. " and " .. frame.length .. " bytes of payload"
    end
    if judge[frame.kind] then
        return judge[frame.kind](session, frame)
    end
    return judge_stream(session, frame)
end

-- ---- frames ---------------------------------------------------------------------------------------------------------

local NAMED = {
    version = true, window = true, instance = true, takeover = true, error = true, message = true, port = true,
}

local function add_lines(tree, payload, from)
    local text, at = payload:raw(), from
    while at < #text do
        local stop = text:find("\n", at + 1, true) or #text + 1
        local line = text:sub(at + 1, stop - 1)
        local key, value = line:match("^([^=]*)=(.*)$")
        if #line > 0 then
            local range = payload(at, #line)
            if NAMED[key] then
                tree:add(fields[key], range, value)
            else
                tree:add(fields.line, range, line)
            end
        end
        at = stop
    end
end

local add = {}

add[INIT] = function(tree, payload)
    local first = payload:raw():match("^[^\n]*")
    local port, address = first:match("^(%d+):(.*)$")
    if port then
        tree:add(fields.port, payload(0, #port), port)
        tree:add(fields["local"], payload(#port, #first - #port), address)
    else
        tree:add(fields.line, payload(0, #first), first)
    end
    add_lines(tree, payload, #first + 1)
end
add[WELCOME] = function(tree, payload) add_lines(tree, payload, 0) end
add[NEW_CONN] = function(tree, payload) tree:add(fields.visitor, payload, payload:raw()) end
add[CLOSE_CONN] = function(tree, payload) tree:add(fields.reason, payload, payload:raw()) end
add[GOAWAY] = add[CLOSE_CONN]
add[DATA] = function(tree, payload) tree:add(fields.data, payload) end
add[WINDOW] = function(tree, payload) if payload:len() == 4 then tree:add(fields.credit, payload) end end
add[PING] = function(tree, payload) tree:add(fields.echo, payload) end
add[PONG] = add[PING]

-- How long the frame is that begins here. One whose payload is over its limit is shown as a header alone.
local function frame_length(buffer, pinfo, offset)
    local kind, length = buffer(offset, 1):uint(), buffer(offset + 5, 4):uint()
    local over = length > (kind == DATA and MAX_DATA_BYTES or MAX_CONTROL_BYTES)
    return HEADER_BYTES + (over and 0 or length)
end

local function dissect_frame(buffer, pinfo, tree)
    local session = session_of()
    local kind, id, length = buffer(0, 1):uint(), buffer(1, 4):uint(), buffer(5, 4):uint()
    local payload = buffer:len() > HEADER_BYTES and buffer(HEADER_BYTES) or nil
    local name = KINDS[kind] and KINDS[kind].name or string.format("unknown 0x%02x", kind)
    local note = remember(notes, pinfo, function()
        local sender = sender_of(session, pinfo, kind)
        local frame = { kind = kind, id = id, length = length, sender = sender }
        frame.text = payload and kind ~= DATA and payload:raw() or ""
        frame.number = kind == WINDOW and length == 4 and payload:uint() or 0
        local rule, why = judge_frame(session, frame)
        return { sender = sender, rule = rule, why = why, level = session.level }
    end)
    local shown = name .. (id > 0 and " " .. id or "") .. (kind == DATA and " (" .. length .. ")" or "")
    local branch = tree:add(rtunnel, buffer(), "rtunnel, " .. ENDS[note.sender] .. ": " .. shown)
    branch:add(fields.type, buffer(0, 1), name)
    branch:add(fields.id, buffer(1, 4))
    branch:add(fields.length, buffer(5, 4))
    branch:add(fields.sender, ENDS[note.sender]):set_generated()
    if note.level then
        branch:add(fields.level, note.level):set_generated()
    end
    if payload then
        (add[kind] or function(place, bytes) place:add(fields.payload, bytes) end)(branch, payload)
    end
    if note.rule then
        branch:add(fields.broken, note.rule):set_generated()
        local text = "[" .. note.rule .. "] broken by the " .. ENDS[note.sender] .. ": " .. note.why
        branch:add_proto_expert_info(broken_rule, text)
    end
    local info = tostring(pinfo.cols.info)
    pinfo.cols.info = (session.shown == pinfo.number and info .. ", " or ENDS[note.sender] .. ": ") .. shown
    session.shown = pinfo.number
    return buffer:len()
end

-- The frames of TLS records, which Wireshark does not put together for a dissector in Lua. A rest is kept for the next.
local function dissect_records(buffer, pinfo, tree)
    local session = session_of()
    local held = session.held or {}
    session.held = held
    local before = remember(rests, pinfo, function() return held[pinfo.src_port] or "" end)
    local whole = buffer
    if #before > 0 then
        local bytes = ByteArray.new(before, true)
        bytes:append(buffer:bytes())
        whole = bytes:tvb("Frames of rtunnel")
    end
    local at = 0
    while whole:len() - at >= HEADER_BYTES and whole:len() - at >= frame_length(whole, pinfo, at) do
        local length = frame_length(whole, pinfo, at)
        dissect_frame(whole(at, length):tvb(), pinfo, tree)
        at = at + length
    end
    if not pinfo.visited then
        held[pinfo.src_port] = at < whole:len() and whole:raw(at) or ""
    end
end

function rtunnel.dissector(buffer, pinfo, tree)
    pinfo.cols.protocol = "rtunnel"
    session_of().shown = nil
    if pinfo.can_desegment > 0 then
        dissect_tcp_pdus(buffer, tree, HEADER_BYTES, frame_length, dissect_frame)
    else
        dissect_records(buffer, pinfo, tree)
    end
    return buffer:len()
end

-- A session shows by its first frame: INIT, whose text begins with a port.
local function looks_like_init(buffer)
    if buffer:len() < HEADER_BYTES + 2 or buffer(0, 5):uint64() ~= UInt64(0, 4) then
        return false
    end
    return buffer(5, 4):uint() <= MAX_CONTROL_BYTES and buffer(HEADER_BYTES):raw():match("^%d+:") ~= nil
end

local function guess(buffer, pinfo, tree)
    local number = tcp_stream()
    if number == nil or (sessions[number.value] == nil and not looks_like_init(buffer)) then
        return false
    end
    rtunnel.dissector(buffer, pinfo, tree)
    return true
end

rtunnel:register_heuristic("tcp", function(buffer, pinfo, tree)
    local is_ours = guess(buffer, pinfo, tree)
    if is_ours then
        pinfo.conversation = rtunnel -- from now on without guessing; under TLS it would take TLS's place
    end
    return is_ours
end)
rtunnel:register_heuristic("tls", guess)
DissectorTable.get("tcp.port"):add_for_decode_as(rtunnel)
DissectorTable.get("tls.port"):add_for_decode_as(rtunnel)

-- ---- to follow a stream ---------------------------------------------------------------------------------------------

local get_id, get_data, get_sender = Field.new("rtunnel.id"), Field.new("rtunnel.data"), Field.new("rtunnel.sender")
local get_type, get_length = Field.new("rtunnel.type"), Field.new("rtunnel.length")

-- Collects the DATA of one stream, in order; `show` is called with its text in the end.
local function follow(id, show)
    local parts = {}
    local tap = Listener.new()
    function tap.packet(pinfo)
        local ids, types, senders, blocks = { get_id() }, { get_type() }, { get_sender() }, { get_data() }
        local lengths = { get_length() }
        local block = 0
        for place, kind in ipairs(types) do
            if kind.value == "DATA" and lengths[place].value > 0 then
                block = block + 1
                if ids[place].value == id and blocks[block] then
                    local bytes = blocks[block].range:raw()
                    table.insert(parts, "--- " .. senders[place].value .. ", " .. #bytes .. " bytes")
                    table.insert(parts, (bytes:gsub("[^\n\32-\126]", ".")))
                end
            end
        end
    end
    function tap.draw() show("rtunnel: stream " .. id .. "\n" .. table.concat(parts, "\n")) end
    function tap.reset() parts = {} end
    return tap
end

local wanted = tonumber((...) or "")
if wanted and not gui_enabled() then
    follow(wanted, print)
elseif gui_enabled() then
    register_menu("rtunnel/Follow a stream", function()
        new_dialog("Follow a stream of rtunnel", function(text)
            local id = tonumber(text)
            if id then
                local window = TextWindow.new("rtunnel: stream " .. id)
                local tap = follow(id, function(shown) window:set(shown) end)
                window:set_atclose(function() tap:remove() end)
                retap_packets()
            end
        end, "Stream")
    end, MENU_TOOLS_UNSORTED)
end
