-- wrk's side of benchmarks/load.py: POST each request file in turn, and print what was measured as one line of JSON.
--
-- wrk -t1 -c16 -d10s -s post_images.lua http://127.0.0.1:4100 -- CONTENT_TYPE TARGETS BODY...
--
-- TARGETS are paths with their queries, joined by spaces; the bodies are files. Both are gone through in turn.

local requests = {}
local turn = 0

function init(args)
   local targets, bodies = {}, {}
   for target in args[2]:gmatch("%S+") do
      targets[#targets + 1] = target
   end
   for index = 3, #args do
      local file = assert(io.open(args[index], "rb"))
      bodies[#bodies + 1] = file:read("*a")
      file:close()
   end
   -- A body for every target, and a target for every body: as many requests as the longer list.
   for index = 1, math.max(#targets, #bodies) do
      local target = targets[(index - 1) % #targets + 1]
      local headers = { ["Content-Type"] = args[1] }
      if #bodies == 0 then
         requests[index] = wrk.format("GET", target)
      else
         requests[index] = wrk.format("POST", target, headers, bodies[(index - 1) % #bodies + 1])
      end
   end
end

function request()
   turn = turn % #requests + 1
   return requests[turn]
end

function done(summary, latency, _)
   local errors = summary.errors
   -- wrk counts microseconds, and answers other than 2xx and 3xx among the requests.
   io.write(string.format(
      '\n{"seconds": %.6f, "num_answers": %d, "num_refused": %d, "num_broken": %d, "p50_ms": %.3f, "p90_ms": %.3f, "p99_ms": %.3f}\n',
      summary.duration / 1e6, summary.requests, errors.status, errors.connect + errors.read + errors.write + errors.timeout,
      latency:percentile(50) / 1e3, latency:percentile(90) / 1e3, latency:percentile(99) / 1e3
   ))
end
