// A BullMQ worker that posts each lead with undici.
//
// Shape: BullMQ's guide, "Workers: Concurrency" (one worker, a concurrency factor), "Going to production" (maxRetriesPerRequest
// null, error handler), "Auto-removal of jobs" (removeOnComplete, set by fill.mjs) and "Retrying failing jobs"; undici's
// documentation, "Pool" and "request" (a pool with as many connections as jobs in work, the body of every answer consumed).
import { Worker } from 'bullmq';
import { Redis } from 'ioredis';
import { Pool } from 'undici';

const concurrency = Number(process.env.CONCURRENCY ?? 64);
const base = new URL(process.env.FUTWORK_BASE_URL);
const pool = new Pool(base.origin, { connections: concurrency, headersTimeout: 30_000, connect: { timeout: 5_000 } });
const connection = new Redis(process.env.BROKER_URL, { maxRetriesPerRequest: null });

async function submit(job) {
  const { campaign, phone, data } = job.data;
  const { statusCode, body } = await pool.request({
    method: 'POST',
    path: `${base.pathname}/campaigns/${campaign}/leads`,
    headers: { 'content-type': 'application/json', 'x-api-key': 'sandbox-key' },
    body: JSON.stringify({ recipientPhoneNumber: phone, recipientData: data }),
  });
  const text = await body.text();
  if (statusCode >= 300) throw new Error(`HTTP ${statusCode} ${text.slice(0, 200)}`);
}

const worker = new Worker('leads', submit, { connection, concurrency });
worker.on('error', (error) => console.error(error));
for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => process.exit(0));
