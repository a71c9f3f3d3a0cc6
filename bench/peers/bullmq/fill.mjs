// Puts the leads of stdin, one JSON object a line, into BullMQ's queue.
//
// Shape: BullMQ's guide, "Adding jobs in bulk", with the job options that "Retrying failing jobs" and "Auto-removal of jobs" advise.
import { createInterface } from 'node:readline';
import { Queue } from 'bullmq';
import { Redis } from 'ioredis';

const connection = new Redis(process.env.BROKER_URL, { maxRetriesPerRequest: null });
const defaultJobOptions = { attempts: 8, backoff: { type: 'exponential', delay: 1000 }, removeOnComplete: true };
const queue = new Queue('leads', { connection, defaultJobOptions });
let jobs = [];
for await (const line of createInterface({ input: process.stdin })) {
  jobs.push({ name: 'submit', data: JSON.parse(line) });
  if (jobs.length === 1000) await queue.addBulk(jobs.splice(0));
}
if (jobs.length) await queue.addBulk(jobs);
await queue.close();
await connection.quit();
